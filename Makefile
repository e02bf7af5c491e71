# The project's commands. Each makes its own environment in .venv first; nothing outside this folder is changed.
PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed
# The demo's arguments, for example: make demo DEMO="--zoo vision"
DEMO   ?=
# The benchmarks' arguments, for example: make benchmark-methods BENCHMARK="--quick"
BENCHMARK ?=
# The experts of make nights: real or pico.
NIGHTS ?= real

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Where it is set, as in many images, each of some 200 processes of the tests would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test nights benchmark benchmark-methods benchmark-scale benchmark-search check clean

install: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	@echo "installing into $(VENV): a few minutes and 2.5 GB the first time"
	$(PYTHON) -m venv $(VENV)
	@# Python compiles what it imports; pip would compile all 33,000 files, on one core.
	$(VENV)/bin/pip install --quiet --no-compile --constraint constraints.txt --editable '.[test,peers,lm-eval,cluster,infra]'
	touch $@

demo: $(STAMP)
	$(VENV)/bin/bmm demo $(DEMO)

# Two processes of one thread each: two threads in each of them would be in each other's way on two cores. They take the
# files in the order of tests/conftest.py.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Four nights with a Prefect server, a worker and an MLflow server, on real experts; or NIGHTS=pico, on tiny ones.
nights: $(STAMP)
	BMM_NIGHTS=$(NIGHTS) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/end_to_end/test_nights.py

benchmark: benchmark-methods benchmark-scale benchmark-search

benchmark-methods: $(STAMP)
	PYTHONPATH=tests $(VENV)/bin/python -m benchmarks.methods $(BENCHMARK)

benchmark-scale: $(STAMP)
	PYTHONPATH=tests $(VENV)/bin/python -m benchmarks.scale $(BENCHMARK)

benchmark-search: $(STAMP)
	PYTHONPATH=tests $(VENV)/bin/python -m benchmarks.searchers $(BENCHMARK)

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) demo demo-vision build *.egg-info
