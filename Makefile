# make notebook   execute README.ipynb top to bottom into executed/ (what a reader runs)
# make lab        open it in JupyterLab
# make test       run the tests
# make test-long  run those of minutes, with transformers, medmnist and others beside the project
# make studies    train what is missing of the MNIST experiment and measure what is missing of its results/ (hours)
# make publish    execute README.ipynb in place and bring README.md in line with it (what a maintainer runs)
# make benchmark  time the usual pipeline and ours side by side, and ours against the size of the data

PYTHON ?= python3
BIN := .venv/bin
export PYTHONSAFEPATH :=
# an environment whose interpreter is gone is made anew
$(shell $(BIN)/python -c "" 2>/dev/null || rm -f .venv/ready)

.PHONY: notebook lab test test-long studies publish benchmark clean

notebook: .venv/ready
	$(BIN)/python -m src.notebook executed/README.ipynb

lab: .venv/ready
	$(BIN)/python -m jupyterlab README.ipynb

test: .venv/ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # in the order of conftest.py

test-long: .venv/ready
	$(BIN)/python -m pip install --disable-pip-version-check transformers medmnist
	$(BIN)/python -m pytest -m long

studies: .venv/ready
	$(BIN)/python -m src.experiments studies

publish: .venv/ready
	$(BIN)/python -m src.notebook --publish

benchmark: .venv/ready
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.photographs
	$(BIN)/python -m benchmarks.door
	$(BIN)/python -m benchmarks.layouts

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; name it with make PYTHON=...")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv  # one that works is kept, with its PyTorch
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv executed
