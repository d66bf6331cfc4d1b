## IMR-CNN on Detectron2. Targets:
##
##   make install   .venv with torch, Detectron2, this package and its tools
##   make test      install, then lint and run the test suite
##   make demo      install, then train, evaluate and report on generated images
##   make lint      install, then ruff alone
##   make wheels    fill the folder WHEELS=DIR with wheels of all that .venv holds
##   make clean     remove .venv and caches
##
## Variables:
##
##   PYTHON=python3.12   the Python (3.10 or newer) that .venv is made with
##   TORCH="..."         another torch build, in pip's words, remembered for later runs, e.g.
##                       TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu"
##   OFFLINE=DIR         install from the wheels in DIR (see `make wheels`) and ask no index

# Threads that wait by spinning take the cores from the ones they wait for: on two busy cores a
# training step takes four times as long.
export OMP_WAIT_POLICY ?= PASSIVE

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

INDEX := $(if $(OFFLINE),--no-index --find-links "$(OFFLINE)")

# The torch that .venv was once asked for stays until another one is asked for.
TORCH_THERE := $(shell cat $(VENV)/torch.txt 2>/dev/null)
export TORCH_BUILD := $(or $(TORCH),$(TORCH_THERE),torch torchvision -c constraints.txt)
ifneq ($(TORCH_BUILD),$(TORCH_THERE))
.PHONY: $(STAMP)
endif

.PHONY: help install test demo lint wheels clean
help:
	@sed -n 's/^## \{0,1\}//p' Makefile

install: $(STAMP)

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or \
	newer is needed; '$(PYTHON)' is not. Name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "'$(PYTHON)' lacks the venv module; on Debian \
	and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

$(STAMP): setup.py constraints.txt tools/install_detectron2.py | $(VENV)/bin/pip
	rm -f $@
ifneq ($(TORCH_BUILD),$(TORCH_THERE))
	$(if $(TORCH_THERE),$(PIP) uninstall --yes torch torchvision)
endif
	$(PIP) install $(INDEX) $(TORCH_BUILD)
	@printf '%s\n' "$$TORCH_BUILD" > $(VENV)/torch.txt
	@# What torch asks for is its own affair: the pins above that line hold for every build.
	sed '/^# torch/,$$d' constraints.txt > $(VENV)/constraints.txt
	$(VENV)/bin/python tools/install_detectron2.py --constraint $(VENV)/constraints.txt \
		$(if $(OFFLINE),--offline "$(OFFLINE)")
	$(PIP) install $(INDEX) --constraint $(VENV)/constraints.txt --no-build-isolation \
		--editable '.[dev,lite]'
	$(PIP) check
	@touch $@

test: lint
	$(VENV)/bin/python -m pytest

lint: install
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

demo: install
	$(VENV)/bin/python tools/demo.py

wheels: install
	@test -n "$(WHEELS)" || { echo "Which folder? make wheels WHEELS=DIR" >&2; exit 1; }
	mkdir -p "$(WHEELS)"
	$(PIP) wheel --wheel-dir "$(WHEELS)" $(TORCH_BUILD)
	$(PIP) freeze --all --exclude-editable --exclude detectron2 > $(VENV)/frozen.txt
	$(PIP) wheel --wheel-dir "$(WHEELS)" --find-links "$(WHEELS)" --no-build-isolation --no-deps \
		--requirement $(VENV)/frozen.txt
	$(VENV)/bin/python tools/install_detectron2.py --fetch "$(WHEELS)"

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
