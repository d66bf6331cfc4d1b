## IMR-CNN on Detectron2. Targets:
##
##   make install   .venv with torch, Detectron2, this package and its tools
##   make test      install, lint, then run the fast tests and some slow ones (7 to 15 minutes)
##   make test-all  install, lint, then run all tests; MIRROR=URL, as root, adds the image build
##   make test-fast install, then run the tests that train nothing and start no browser
##   make demo      install, then train, evaluate and report on synthetic images
##   make lint      install, then ruff, the import directions and the banned words
##   make docs      install, then write the documentation to site/
##   make benchmark install, then measure this machine (docs/performance.md)
##   make bundle    collect everything that OFFLINE=DIR needs in the folder BUNDLE=DIR
##   make clean     remove .venv and caches
##
## Variables:
##
##   PYTHON=python3.12   the Python (3.10 or newer) that .venv is made with
##   TORCH="..."         another torch build, in pip's words, remembered for later runs, e.g.
##                       TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu"
##   OFFLINE=DIR         install from the bundle DIR (see `make bundle`), without a package index
##   WEIGHTS="URL ..."   pretrained weights that `make bundle` includes: URLs as in MODEL.WEIGHTS,
##                       with #sha256=HEX appended where the checksum is known

# Threads that wait by spinning take the cores from the threads they wait for: on two busy cores a
# training step takes four times as long.
export OMP_WAIT_POLICY ?= PASSIVE

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed
PACKAGE := .[dev,lite]
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

ifdef OFFLINE
INDEX := --no-index --find-links "$(OFFLINE)/wheels"
# Nor the sources in pip's settings.
export PIP_CONFIG_FILE := /dev/null
export PIP_FIND_LINKS :=
export PIP_CONSTRAINT :=
endif

# The torch build of .venv stays until another one is requested.
TORCH_THERE := $(shell cat $(VENV)/torch.txt 2>/dev/null)
DEFAULT_TORCH := torch torchvision$(if $(OFFLINE),, -c constraints.txt)
export TORCH_BUILD := $(or $(TORCH),$(if $(OFFLINE),,$(TORCH_THERE)),$(DEFAULT_TORCH))
ifneq ($(TORCH_BUILD),$(TORCH_THERE))
.PHONY: $(STAMP)
endif

.PHONY: help install test test-all test-fast demo lint docs benchmark bundle clean
help:
	@sed -n 's/^## \{0,1\}//p' Makefile

install: $(STAMP)

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or \
	newer is needed; '$(PYTHON)' is not. Name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "'$(PYTHON)' lacks the venv module; on Debian \
	and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

# The pins above that line hold for every build of torch; those below are for the default one.
$(VENV)/constraints.txt: constraints.txt | $(VENV)/bin/pip
	sed '/^# torch/,$$d' constraints.txt > $@

$(STAMP): pyproject.toml imrcnn_d2/__init__.py $(VENV)/constraints.txt imrcnn_d2/cli/install_detectron2.py | $(VENV)/bin/pip
	rm -f $@
	$(if $(OFFLINE),$(VENV)/bin/python packaging/bundle.py check "$(OFFLINE)")
ifneq ($(TORCH_BUILD),$(TORCH_THERE))
	$(if $(TORCH_THERE),$(PIP) uninstall --yes torch torchvision)
endif
	$(PIP) install $(INDEX) $(TORCH_BUILD)
	@printf '%s\n' "$$TORCH_BUILD" > $(VENV)/torch.txt
	$(VENV)/bin/python imrcnn_d2/cli/install_detectron2.py --constraint $(VENV)/constraints.txt \
		$(if $(OFFLINE),--offline "$(OFFLINE)/wheels")
	$(PIP) install $(INDEX) --constraint $(VENV)/constraints.txt --no-build-isolation \
		--use-pep517 --editable "$(PACKAGE)"
	$(PIP) check
	@# Detectron2 looks for its downloads there.
	@if [ -d "$(OFFLINE)/weights" ]; then cache="$${FVCORE_CACHE:-$$HOME/.torch/iopath_cache}"; \
		mkdir -p "$$cache" && cp -R "$(OFFLINE)/weights/." "$$cache/"; fi
	@touch $@

# One worker per core (tests/conftest.py), each file on one worker, for the fixtures its tests share.
PYTEST = $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
	--durations 15

test: lint
	$(PYTEST) -m "not slow or story"

test-all: lint
	$(PYTEST)

test-fast: install
	$(PYTEST) -m "not slow"

lint: install
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/lint-imports
	.ci/words

docs: install
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

benchmark: install
	$(VENV)/bin/python benchmarks/benchmark.py all --short

demo: install
	$(VENV)/bin/python -m imrcnn demo

bundle: $(VENV)/constraints.txt
	@test -n "$(BUNDLE)" || { echo "Name the folder: make bundle BUNDLE=DIR" >&2; exit 1; }
	$(PIP) install --constraint $(VENV)/constraints.txt setuptools wheel
	$(VENV)/bin/python packaging/bundle.py collect "$(BUNDLE)" --torch "$$TORCH_BUILD" \
		--package "$(PACKAGE)" --constraint $(VENV)/constraints.txt --weights "$(WEIGHTS)"

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache .hypothesis
