PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo bench test test-slow test-cluster lint clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@echo "installing the pinned packages into .venv: a minute or two"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# Phantom corpus -> shards -> CCL-MPC on two processes -> evaluation on held-out cases -> report.
demo: setup
	rm -rf data/phantom runs/demo
	$(BIN)/cclmpc shard 48 --format phantom --out data/phantom --labelled 4 --val-last 8
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m cclmpc_dist train configs/demo.yaml
	$(BIN)/cclmpc eval runs/demo
	$(BIN)/cclmpc report runs/demo

# The benchmarks of a CPU again, into runs/bench, and beside the committed ones. On phantoms, or with LA=FOLDER LIST=FILE
# on volumes as UA-MT's authors publish them, and on data/la where that is there.
bench: setup
	$(BIN)/cclmpc bench all configs/la_cpu.yaml --out runs/bench $(if $(LA),--la $(LA)) $(if $(LIST),--list $(LIST))
	$(BIN)/cclmpc bench compare benchmarks/results runs/bench > runs/bench/compare.md
	@echo "runs/bench/report.md has the tables and plots, runs/bench/compare.md what was committed beside"

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not cluster and not gpu and not slow"

# Every combination that `test` samples.
test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not cluster and not gpu"

# The tests that need real daemons, on the loopback, or DeepSpeed: installs Slurm and nginx where it may, Ray, DeepSpeed,
# an S3 server and blosc2.
test-cluster: setup
	bash tests/slurm_install.sh
	bash tests/nginx_install.sh
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench,deepspeed,dev,ray,remote,s3-test]"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m cluster

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv data/phantom runs/demo
