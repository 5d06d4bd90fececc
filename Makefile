# make notebook   execute README.ipynb top to bottom into executed/ (what a reader runs)
# make lab        open it in JupyterLab
# make test       run the tests
# make studies    train what is missing of the MNIST experiment and measure every row of results/ on it (hours)
# make publish    execute README.ipynb in place and bring README.md in line with it (what a maintainer runs)
# make benchmark  time the usual pipeline and ours side by side, and ours against the size of the data

PYTHON ?= python3
BIN := .venv/bin
export PYTHONSAFEPATH :=
# an environment whose interpreter is gone is made anew
$(shell $(BIN)/python -c "" 2>/dev/null || rm -f .venv/ready)

.PHONY: notebook lab test studies publish benchmark clean

notebook: .venv/ready
	$(BIN)/python -m src.notebook executed/README.ipynb

lab: .venv/ready
	$(BIN)/python -m jupyterlab README.ipynb

test: .venv/ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

studies: .venv/ready
	$(BIN)/python -m src.experiments studies

publish: .venv/ready
	$(BIN)/python -m src.notebook --publish

benchmark: .venv/ready
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.photographs
	$(BIN)/python -m benchmarks.layouts

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; name it with make PYTHON=...")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv executed
