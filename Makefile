# One command each, from a fresh clone: everything they need goes into .venv/.
#   make demo   train, validate and predict on handwritten digits; the files are in demo/
#   make test   the tests
#   make lint   ruff
#   make resume-matrix   kill trainings and resume them, the whole table of BENCHMARKS.md (about 20 minutes)
#   make faults  kills, signals, full disks, bad data, hostile files, wrong options: the tables of BENCHMARKS.md (about an hour)
# PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := demo

.PHONY: demo test lint format install clean resume-matrix faults

install: $(STAMP)

# torch and torchvision are resolved together by the one pip call; an old venv is kept and brought up to date.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/hornet-lit fit --config digits --trainer.logger.save_dir $(DEMO) --trainer.logger.name digits --trainer.logger.version run
	$(BIN)/hornet-lit validate --ckpt_path $(DEMO)/digits/run/checkpoints/last.ckpt
	$(BIN)/python -c 'from hornet_lit.data.digits import save_images; save_images("$(DEMO)/images", 24)'
	$(BIN)/hornet-lit predict --ckpt_path $(DEMO)/digits/run/checkpoints/last.ckpt \
		--data.predict_path $(DEMO)/images --prediction.output $(DEMO)/predictions.csv --prediction.top_k 3
	@echo
	@echo 'checkpoint       $(DEMO)/digits/run/checkpoints/last.ckpt'
	@echo 'metrics          $(DEMO)/digits/run/metrics.csv'
	@echo 'learning curves  $(DEMO)/digits/run/curves.png'
	@echo 'predicted sheet  $(DEMO)/digits/run/predictions.png   (held-out digits with their labels)'
	@echo 'images           $(DEMO)/images/NNN_digit_D.png       (held-out digits, predicted below)'
	@echo 'predictions      $(DEMO)/predictions.csv'
	@head -5 $(DEMO)/predictions.csv

test: $(STAMP)
	$(BIN)/python -m pytest

resume-matrix: $(STAMP)
	$(BIN)/python -m tests.distributed.resume_matrix

faults: $(STAMP)
	$(BIN)/python -m tests.faults

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) build dist .pytest_cache .ruff_cache .hypothesis
