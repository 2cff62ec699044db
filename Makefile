# Each target does all its own set-up: a virtual environment, and everything installed in it.
PYTHON ?= python3
VENV := .venv
# Bytecode is kept whatever the environment says: pip leaves it out, and every process would compile torch anew.
RUN := PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 $(VENV)/bin

# What was tried, lowest and newest: docs/versions.md.
FLOOR := .venv-floor
LOWEST := torch==2.6.0 torchvision==0.21.0 diffusers==0.37.1 transformers==5.6.2 tokenizers==0.22.2 accelerate==1.0.1 \
	numpy==2.0.2 pillow==11.0.0 matplotlib==3.9.4 jaxtyping==0.3.11 peft==0.18.1
NEWEST := .venv-newest
TESTING := pytest hypothesis beartype sentencepiece ftfy scipy torchmetrics
LEFT_OUT := --deselect 'tests/method/test_released.py::test_background_is_the_released_one[sd3]'  # too few regions there to be a test
CORE := tests/test_embedded_model.py tests/pipeline/test_contract.py tests/hooks/test_observer.py tests/hooks/test_guided.py tests/method

.PHONY: browser demo bench test test-floor test-newest fuzz check docs notebooks features format speed gpu-budget speed-gpu report clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --no-compile --editable ".[dev]"
	touch $@

demo: $(VENV)/installed  ## six pictures in demo/, and mIoU of vanilla and GoCA on held-out scenes
	$(RUN)/goca demo --out demo
	$(RUN)/python -m eval.segmentation configs/demo.toml

bench: $(VENV)/installed  ## every method on Scenes with the embedded model, and the ablation of GoCA: some minutes
	$(RUN)/python -m eval.segmentation configs/segment/scenes.toml --pictures 4
	$(RUN)/python -m eval.segmentation configs/segment/scenes_ablation.toml
	$(RUN)/python -m eval.segmentation configs/segment/scenes_switches.toml
	$(RUN)/python -m eval.segmentation configs/segment/scenes_background.toml
	$(RUN)/python -m eval.report

test: check  ## what CI runs, a process a core
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n auto --dist worksteal

test-floor:  ## the core's tests with the lowest versions, in an environment of their own
	$(PYTHON) -m venv --clear $(FLOOR)
	$(FLOOR)/bin/pip install --quiet --editable . $(LOWEST) $(TESTING)
	HF_HUB_OFFLINE=1 $(FLOOR)/bin/python -m pytest $(CORE) $(LEFT_OUT)

test-newest:  ## the same with the newest that pip finds
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable ".[families]" $(TESTING)
	HF_HUB_OFFLINE=1 $(NEWEST)/bin/python -m pytest $(CORE)

fuzz: $(VENV)/installed  ## random calls, faults and kills: `make fuzz CALLS=20000 KILLS=50`, or MINUTES=30, SEED=1
	OMP_NUM_THREADS=1 $(RUN)/python -m tests.fuzz $(if $(CALLS),--calls $(CALLS)) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(SEED),--seed $(SEED)) $(if $(KILLS),--kills $(KILLS))

features: $(VENV)/installed  ## docs/features.md, docs/families.md and results/pipelines.json, every cell tried
	$(RUN)/python -m tests.features
	$(RUN)/python -m tests.loops

notebooks: $(VENV)/installed  ## the two notebooks from the first cell to the last, which `make test` leaves out for time
	$(VENV)/bin/pip install --quiet --no-compile --editable ".[notebooks]"
	$(RUN)/python -m pytest tests/test_docs.py

browser: $(VENV)/installed  ## the page in headless Chromium (Debian: apt install chromium); `make test` does without playwright
	command -v chromium || command -v chromium-browser
	$(VENV)/bin/pip install --quiet --no-compile playwright
	$(RUN)/python -m pytest tests/app/test_browser.py

docs: $(VENV)/installed  ## the documents as a site, site/index.html; a broken link fails
	$(VENV)/bin/mkdocs build --strict --quiet

check: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

speed: $(VENV)/installed  ## what guidance costs on this machine's CPU: an hour, and a killed run goes on
	$(RUN)/python -m eval.speed --device cpu
	$(RUN)/python -m eval.core_cost --device cpu

gpu-budget: $(VENV)/installed  ## what guidance adds on a GPU, counted without one: half an hour, and a killed run goes on
	$(RUN)/python -m eval.gpu_budget

speed-gpu: $(VENV)/installed  ## all that a GPU can tell, in less than 25 minutes, and a killed run goes on
	$(RUN)/python -m eval.speed_gpu --device cuda

report: $(VENV)/installed  ## results/*.json into the documents, and the pictures of `make demo` into docs/picture.png
	$(RUN)/python -m eval.report

clean:
	rm -rf $(VENV) $(FLOOR) $(NEWEST) demo site build dist
