"""Deep feature reweighting (Kirichenko et al. 2023): what knowing the groups buys without new features."""

import copy

import torch
from torch import Tensor, nn

from ..inference import infer
from ..seeding import generator

DFR_DRAWS = 10  # of balanced subsets, averaged; as the authors


def refit_last_layer(model: nn.Module, images: Tensor, labels: Tensor, groups: Tensor, seed: int) -> None:
    """Fit the last layer of a model of two classes anew, in place: the mean of ten logistic regressions.

    Each is fitted to as many images of every group as the smallest has, with the L2 penalty 1 (the authors tune an L1).
    """
    from sklearn.linear_model import LogisticRegression

    head = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)][-1]
    body = copy.deepcopy(model)
    body.set_submodule(head, nn.Identity())
    members = [torch.nonzero(groups == group).flatten() for group in range(4)]
    size, draw = min(map(len, members)), generator(seed, "dfr")
    lines = []
    for _ in range(DFR_DRAWS):
        chosen = torch.cat([group[torch.randperm(len(group), generator=draw)[:size]] for group in members])
        fit = LogisticRegression(max_iter=1000).fit(infer(body, images[chosen]).cpu(), labels[chosen].cpu())
        lines.append(torch.tensor([*fit.coef_[0], *fit.intercept_], dtype=torch.float64))
    *weight, bias = torch.stack(lines).mean(0)
    with torch.no_grad():
        model.get_submodule(head).weight.copy_(torch.stack([torch.zeros(len(weight)), torch.stack(weight)]))
        model.get_submodule(head).bias.copy_(torch.stack([torch.tensor(0.0), bias]))
