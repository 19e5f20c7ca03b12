# One command each; `make setup` is done by itself when it is needed.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
EXTRA ?= cpu
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.ready-$(EXTRA)
export UV_PYTHON_DOWNLOADS := never

.PHONY: help setup serve demo test check fix bench bench-train eval soak tiny train-demo hotload-demo lock

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## install everything into .venv (EXTRA=gpu for a GPU machine)

$(STAMP): requirements/$(EXTRA).txt pyproject.toml deploy/setup
	deploy/setup $(EXTRA) "$(PYTHON)"
	@touch $@

serve: $(STAMP) ## serve the packaged molmo2-tiny (CHECKPOINT=folder for another model)
	$(RUN)/molmo serve $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) $(ARGS)

demo: $(STAMP) ## open the demo page; the server must be running
	$(RUN)/molmo demo $(ARGS)

eval: $(STAMP) ## measure the running server on freshly drawn scenes
	$(RUN)/molmo eval run scenes $(ARGS)

test: $(STAMP) ## set up and run the tests
	$(RUN)/python -m pytest -q -m "not soak" $(ARGS)

check: $(STAMP) ## lint, types, layers
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

fix: $(STAMP) ## repair what the linter can repair
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

soak: $(STAMP) ## the slow checks, results in docs/
	$(RUN)/python -m pytest -q -m soak $(ARGS)

bench: $(STAMP) ## measure speed, all parts or ARGS="gateway routing"
	$(RUN)/python -m tests.bench $(ARGS)

bench-train: $(STAMP) ## measure training: packing, loader, trainer, memory
	$(RUN)/python -m tests.bench packing training memory

tiny: $(STAMP) ## train molmo2-tiny again, from nothing, and package it (hours)
	deploy/train-tiny $(ARGS)

train-demo: $(STAMP) ## train through all stages, then on your own kind of pictures (10 minutes)
	deploy/train-demo $(ARGS)

hotload-demo: $(STAMP) ## teach molmo2-tiny something and see the running server answer it
	deploy/hotload-demo $(ARGS)

lock: ## resolve the requirements again
	for extra in cpu gpu; do .tools/bin/uv pip compile pyproject.toml --universal \
	  --python-version 3.11 --extra $$extra --extra demo --extra evals --extra training \
	  --group dev --generate-hashes --no-annotate --no-header -q -o requirements/$$extra.txt; done
