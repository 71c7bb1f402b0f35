# `make demo` and `make test` work on a fresh machine with Python >= 3.11 and a package index.
PYTHON ?= python3
BIN := .venv/bin
RUNTIME ?= cpu
FROM ?=

.PHONY: demo test check docs bench gpu peers clean

demo: .venv/ready
	$(BIN)/cxrloop demo $(if $(FROM),--from "$(FROM)")

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(MAKE) docs

# The documentation site, in build/docs; a warning is an error. It needs no network.
docs: .venv/ready
	$(BIN)/sphinx-build -q -W --keep-going -c docs -d build/doctrees . build/docs

bench: .venv/ready
	$(BIN)/python bench/learning/creep.py
	$(BIN)/python bench/learning/demo_recipe.py
	$(BIN)/python bench/speed/train_speed.py
	$(BIN)/python bench/learning/growth_images.py

# Everything that needs a GPU, in eight minutes, into bench/results/gpu.json; a torch with CUDA must be there.
# Without a network: make gpu WHEELS=FOLDER
gpu:
	$(PYTHON) bench/speed/gpu.py $(if $(WHEELS),--wheels "$(WHEELS)")

# The programs that tests marked `peer` talk to: dcmtk, orthanc with DICOMweb, dicom3tools, systemd-analyze.
peers:
	@if command -v dcmsend >/dev/null && { command -v Orthanc || test -x /usr/sbin/Orthanc; } >/dev/null \
	  && test -e /usr/share/orthanc/plugins/libOrthancDicomWeb.so \
	  && command -v dciodvfy >/dev/null && command -v systemd-analyze >/dev/null && command -v sqlite3 >/dev/null \
	  && command -v openssl >/dev/null; then echo "peers: all here"; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -q && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -q -y --no-install-recommends dcmtk orthanc orthanc-dicomweb dicom3tools systemd sqlite3 openssl; \
	else echo "peers: need root and apt: apt-get install dcmtk orthanc orthanc-dicomweb dicom3tools systemd sqlite3 openssl"; fi

# One stamp: the environment is rebuilt when pyproject.toml changes, and only then.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$(RUNTIME),train,dev]"
	touch $@

clean:
	rm -rf .venv demo
