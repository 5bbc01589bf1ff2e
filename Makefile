# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own virtual environment.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VENV ?= .venv
BIN := $(VENV)/bin
SETUP = $(PYTHON) tools/venv.py $(VENV) $(1) --torch "$(TORCH)" $(if $(TORCH_INDEX),--index $(TORCH_INDEX)) $(if $(CUDA),--cuda)

.PHONY: demo test test-models test-triton test-triton-full test-cudnn test-flash lint docs bench bench-model gpu clean

demo:
	@$(call SETUP,dev)
	@$(BIN)/python examples/decoder_layer.py

test:
	@$(call SETUP,dev)
	@$(BIN)/python -m pytest -n auto

lint:
	@$(call SETUP,dev)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# What is generated: the support matrix, the list of rules, the schema of the JSON report, the report in the README.
docs:
	@$(call SETUP,dev)
	@$(BIN)/python tools/parse_configs.py
	@$(BIN)/attnrt matrix --write docs
	@$(BIN)/python tools/readme.py

# Every figure of the README that a machine without a GPU can give.
bench:
	@$(call SETUP,bench)
	@$(BIN)/python benchmarks/dispatch.py | tee $(VENV)/dispatch.txt
	@$(BIN)/python tools/readme.py --dispatch $(VENV)/dispatch.txt
	@$(BIN)/python benchmarks/memory.py

# attnrt inside transformers and diffusers, against eager, on small random models.
test-models:
	@$(PYTHON) tools/venv.py $(VENV)-models dev,models --torch "$(TORCH)" $(if $(TORCH_INDEX),--index $(TORCH_INDEX))
	@$(VENV)-models/bin/python -m pytest tests/integrations -n auto

# What attnrt costs a whole model: 12 layers, eager and compiled.
bench-model:
	@$(PYTHON) tools/venv.py $(VENV)-models dev,models --torch "$(TORCH)" $(if $(TORCH_INDEX),--index $(TORCH_INDEX))
	@$(VENV)-models/bin/python benchmarks/model.py

# The Triton kernels without a GPU: numerics in the interpreter, code generation for sm80 to sm100. Minutes, for a sample of
# the grids; test-triton-full runs them whole, for an hour.
test-triton-full: export TRITON_TESTS = full
test-triton-full: test-triton
test-triton:
	@$(PYTHON) tools/venv.py $(VENV)-triton dev,triton-test --torch "$(TORCH)" $(if $(TORCH_INDEX),--index $(TORCH_INDEX))
	@$(VENV)-triton/bin/python -m pytest tests/backends/triton -n auto

# cuDNN without a GPU: its support check, and full plans, beside our rules, for three GPUs; the Triton kernels beside
# them. 2 GB of wheels, minutes.
test-cudnn:
	@$(PYTHON) tools/venv.py $(VENV)-cudnn dev,cudnn-deviceless,triton-test --torch "$(TORCH)" $(if $(TORCH_INDEX),--index $(TORCH_INDEX))
	@$(VENV)-cudnn/bin/python -m pytest tests/backends/cudnn -n 2

# flash-attn 4 without a GPU: what our rules say it takes is compiled for sm90 and sm100. Minutes.
test-flash:
	@$(PYTHON) tools/venv.py $(VENV)-flash dev,flash-test --torch "$(TORCH)" $(if $(TORCH_INDEX),--index $(TORCH_INDEX))
	@$(VENV)-flash/bin/python -m pytest tests/backends/flash_attn -n 2

# On a GPU machine, with the python that has its torch: the GPU tests and benchmarks, results in gpu-results/.
GPU_PYTHON ?= python3
gpu:
	@$(GPU_PYTHON) benchmarks/gpu.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
