"""Wrong settings of a run file or of ``--set``, and wrong command lines."""

from __future__ import annotations

from .workshop import Wrong, causal_setting, setting, words

SETTINGS = {
    "an unknown key with a near miss": Wrong(
        setting("schedule.final_sparsty=0.5"),
        "schedule.final_sparsty",
        "final_sparsty",
        "Did you mean 'final_sparsity'?",
    ),
    "an unknown key with none": Wrong(
        setting("eval.zzz=1"), "unknown key 'eval.zzz'", "zzz", "Known keys: interval, batch_size, metric"
    ),
    "an unknown table": Wrong(setting("scheduel.final_sparsity=0.5"), "'scheduel'", "scheduel", "'schedule'"),
    "--set without =": Wrong(setting("train.num_steps"), "--set", "'train.num_steps'", "the form key=value, such as"),
    "--set into a value": Wrong(setting("seed.of=3"), "--set 'seed.of=3'", "seed is a value", "not a table"),
    "a value of another type": Wrong(
        setting("train.num_steps=many"), "train.num_steps", "'many'", "must be a whole number"
    ),
    "few bits for weights that train": Wrong(
        setting("model.base_bits=4", "method=dense"), "model.base_bits", "4", "to one of 'pst', 'lora'"
    ),
    "an embedding of few bits that trains": Wrong(
        setting("model.embedding_bits=8", 'pst.update_embeddings=["word_embeddings"]'),
        "word_embeddings",
        "few bits",
        "leave one of them out",
    ),
    "an embedding of few bits in groups that do not divide": Wrong(
        setting("model.embedding_bits=4"), "word_embeddings.weight", "groups of 64", "take 32 or row"
    ),
    "bits that there are not": Wrong(setting("model.base_bits=2"), "model.base_bits", "2", "must be one of 16, 8, 4"),
    "a group of the base without few bits": Wrong(
        setting("model.base_group=64"), "model.base_group", "64", "set model.base_bits to 8 or 4"
    ),
    "a group of the base that does not divide": Wrong(
        setting("model.base_bits=4", "model.base_group=64"), "groups of 64", "32 inputs", "take 32 or row"
    ),
    "experts on ranks without ZeRO-3": Wrong(
        setting("train.expert_parallel=2", "deepspeed_config="), "train.expert_parallel", "2", "Set deepspeed_config"
    ),
    "experts on ranks of a method that prunes none": Wrong(
        setting("train.expert_parallel=2", "method=dense", "deepspeed_config=ds_configs/zero3_cpu.json"),
        "train.expert_parallel",
        "method = 'dense' prunes none",
        "another method",
    ),
    "experts on ranks that are ranked by activations": Wrong(
        setting("train.expert_parallel=2", "pst.magnitude=activation", "deepspeed_config=ds_configs/zero3_cpu.json"),
        "train.expert_parallel",
        'pst.magnitude = "activation"',
        'Set "weight"',
    ),
    "a list that is a string": Wrong(
        setting("data.text_columns=text"), "data.text_columns", "'text'", "must be a list of strings"
    ),
    "activations that wait on the host and are not recomputed": Wrong(
        setting("model.activation_offload=true"), "model.activation_offload", "true", "gradient_checkpointing_reentrant"
    ),
    "a tracker that there is none of": Wrong(
        setting("tracking.to=['wandbs']"), "tracking.to", "['wandbs']", "among 'wandb', 'mlflow', 'trackio'"
    ),
    "a tracker that is not installed": Wrong(
        setting("tracking.to=['trackio']"), "tracking.to", "trackio", "pip install 'pst-ds[trackers]'"
    ),
    "an unknown task": Wrong(
        setting("task=clasification"), "task", "'clasification'", "must be one of 'classification'"
    ),
    "an unknown method": Wrong(setting("method=wanda"), "method", "'wanda'", "must be one of 'pst', 'dense', 'lora'"),
    "an unknown precision": Wrong(
        setting("train.precision=fp16"), "train.precision", "'fp16'", "one of 'bf16', 'fp32'"
    ),
    "an unknown pattern": Wrong(setting("pst.pattern=rows"), "pst.pattern", "'rows'", 'there are "matrix", "stack"'),
    "an unknown preset": Wrong(setting("pst.preset=papr"), "pst.preset", "'papr'", "one of default, paper"),
    "an unknown data preset": Wrong(setting("data.preset=glue/sst3"), "data.preset", "'glue/sst3'", "sst2"),
    "a sparsity above 1": Wrong(
        setting("schedule.final_sparsity=1.2"), "schedule.final_sparsity", "1.2", "must be in [0, 1)"
    ),
    "a sparsity of 1": Wrong(
        setting("schedule.final_sparsity=1"), "schedule.final_sparsity", "1.0", "must be in [0, 1)"
    ),
    "a negative sparsity of some layers": Wrong(
        setting('pst.overrides=[{modules=["query"], final_sparsity=-0.1}]'),
        "train: pst.overrides.final_sparsity",
        "-0.1",
        "must be in [0, 1)",
    ),
    "warm-up and cool-down that leave no ramp": Wrong(
        setting("schedule.warmup_fraction=0.6", "schedule.cooldown_fraction=0.4"),
        "schedule.warmup_fraction",
        "0.6",
        "their sum must be below 1",
    ),
    "a sparsity that the pattern does not have": Wrong(
        setting("pst.pattern='2:4'"), "schedule.final_sparsity", "0.8", "Fix: schedule.final_sparsity = 0.5"
    ),
    "steps and epochs": Wrong(
        setting("train.num_epochs=2"), "train.num_steps = 4 and train.num_epochs", "2.0", "set one of them"
    ),
    "a learning rate below 0": Wrong(
        setting("train.score_learning_rate=-1e-3"), "train.score_learning_rate", "-0.001", "of at least 0"
    ),
    "a metric of another task": Wrong(
        setting("eval.metric=pearson"), "eval.metric", "'pearson'", "choose from 'accuracy'"
    ),
    "zeros of the base as a mask that moves": Wrong(
        setting("pst.initial_mask=zeros"), "pst.initial_mask", '"zeros"', "Remove it"
    ),
    "factors of W0, which no method trains any more": Wrong(
        setting("pst.multiplicative_update=true"), "pst.multiplicative_update", "True", 'set method = "masked-lora"'
    ),
    "a score for each weight, which no method trains any more": Wrong(
        setting("pst.full_scores=true"), "pst.full_scores", "True", 'set method = "pst"'
    ),
    "activations beside zeros that are kept": Wrong(
        setting("method=masked-lora", "pst.initial_mask=zeros", "pst.magnitude=activation"),
        "pst.magnitude",
        'pst.initial_mask = "zeros"',
        "Remove it",
    ),
    "a sparsity that one ranking of all matrices cannot reach": Wrong(
        setting("method=gmp", "pst.pattern=global", "schedule.final_sparsity=0.99"),
        "pst.min_kept_share",
        "0.02",
        "Fix: pst.min_kept_share below 0.01",
    ),
    "a regular expression that is none": Wrong(
        setting("pst.target_modules='(query'"), "pst.target_modules", "'(query'", "give a list of names"
    ),
    "a teacher without a weight": Wrong(
        setting("distillation.teacher=tests/data/tiny-bert"),
        "distillation.teacher",
        "'tests/data/tiny-bert'",
        "Remove distillation.teacher, or set distillation.weight",
    ),
    "distillation of a number": Wrong(
        setting("task=regression", "distillation.weight=0.5", "data.train={made}/numbers.jsonl"),
        "distillation.weight",
        "0.5",
        "Set distillation.weight = 0",
    ),
    "a batch smaller than the accumulation": Wrong(
        setting("train.gradient_accumulation_steps=25"), "train.batch_size", "24", "or more, or start fewer ranks"
    ),
    "a batch larger than the data": Wrong(
        setting("train.batch_size=480"), "train.batch_size", "480", "240 examples, fewer than one batch"
    ),
    "sequences of one token": Wrong(causal_setting("data.max_length=1"), "data.max_length", "1", "must be at least 2"),
    "an output_dir that is not UTF-8": Wrong(
        setting("output_dir={tmp}/\udcff"), "output_dir", "{tmp}/\\udcff", "Rename the file or folder"
    ),
    "an empty output_dir": Wrong(setting("output_dir="), "output_dir", "''", "Name the folder"),
    "an output_dir below a file": Wrong(
        lambda shop: shop.train(f"output_dir={shop.below_a_file('run')}"),
        "output_dir",
        "{tmp}/plain-file/run",
        "name a place elsewhere",
    ),
    "a run file that is not there": Wrong(
        words("train", "no/such.toml"), "run file", "'no/such.toml'", "name a run file or a run folder"
    ),
    "a run file that is not TOML": Wrong(
        lambda shop: ["train", shop.file("run.toml", 'output_dir = "a"\n[train\nnum_steps = 3\n')],
        "{tmp}/run.toml",
        "line 2",
        "TOML",
    ),
    "a run file in another encoding": Wrong(
        lambda shop: ["train", shop.file("run.toml", 'output_dir = "é"\n'.encode("latin-1"))],
        "{tmp}/run.toml",
        "0xe9",
        "save it in UTF-8",
    ),
    "a run file without a model": Wrong(
        lambda shop: ["train", shop.file("run.toml", 'output_dir = "a"\n[data]\ntrain = "a"\n[train]\nnum_steps=1\n')],
        "'model.path' is missing",
        "model.path",
        "--set model.path=",
    ),
    "a run file with an empty model": Wrong(setting("model.path="), "model.path", "''", "name a model folder"),
    "a folder that is no run": Wrong(
        words("train", "{made}/plain"), "{made}/plain", "run.toml is missing", "run folder"
    ),
    "ranks that the batch has no examples for": Wrong(
        setting("train.batch_size=1"),
        "train.batch_size",
        "1",
        "make it 2 or more",
        environment={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ),
    "ranks without DeepSpeed": Wrong(
        setting("deepspeed_config="),
        "deepspeed_config is not set",
        "2 ranks",
        "ds_configs/zero3_cpu.json",
        environment={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ),
    "half a launcher": Wrong(
        setting(),
        "the environment",
        "RANK, WORLD_SIZE but not LOCAL_RANK",
        "launch/local.sh",
        environment={"RANK": "0", "WORLD_SIZE": "2"},
    ),
    "a rank that is no number": Wrong(
        setting(),
        "WORLD_SIZE",
        "'two'",
        "unset them for one process",
        environment={"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"},
    ),
}

COMMAND_LINES = {
    "a plan with a teacher that is not there": Wrong(
        lambda shop: shop.train("distillation.weight=0.5", "distillation.teacher=no/teacher", verb="plan"),
        "distillation.teacher",
        "'no/teacher'",
        "name a model folder",
    ),
    "ranks to plan for without DeepSpeed": Wrong(
        lambda shop: [*shop.train(verb="plan"), "--ranks", "2"],
        "deepspeed_config is not set",
        "2 ranks",
        "or start one process",
    ),
    "a plan for a machine that is none": Wrong(
        lambda shop: [*shop.train(verb="plan"), "--machine", "h1000"], "--machine", "h1000", "name a TOML file"
    ),
    "a plan for a machine without its rates": Wrong(
        lambda shop: [*shop.train(verb="plan"), "--machine", shop.file("mine.toml", 'name = "mine"\n')],
        "{tmp}/mine.toml",
        "flops, memory_bytes",
        "Set them as docs/how-to/large-models.md describes",
    ),
    "no verb": Wrong(words(), "required", "VERB", "pst-ds --help"),
    "an unknown verb": Wrong(words("trian", "run.toml"), "pst-ds: unknown verb", "'trian'", "Did you mean 'train'?"),
    "an unknown option": Wrong(
        words("train", "run.toml", "--sett", "a=b"),
        "pst-ds train: unknown argument",
        "'--sett'",
        "Did you mean '--set'?",
    ),
    "an argument too few": Wrong(words("export", "{made}/run"), "export", "--out", "pst-ds export --help"),
    "a choice that is none": Wrong(
        words("export", "{made}/run", "--out", "{tmp}/out", "--format", "zip"), "--format", "'zip'", "dense"
    ),
    "a count of 0": Wrong(
        words("export", "{made}/run", "--out", "{tmp}/out", "--shard-bytes", "0"),
        "--shard-bytes",
        "'0'",
        "a whole number of at least 1",
    ),
    "resume and restart": Wrong(
        words("train", "{made}/run", "--resume", "--restart"), "--restart", "--resume", "not allowed"
    ),
    "ranks that are no number": Wrong(
        words("plan", "tests/data/world_size.toml", "--ranks", "two"),
        "--ranks",
        "'two'",
        "a whole number of at least 1",
    ),
    "no ranks": Wrong(
        words("plan", "tests/data/world_size.toml", "--ranks", "0"), "--ranks", "'0'", "a whole number of at least 1"
    ),
    "a machine that is not known": Wrong(
        words("plan", "tests/data/world_size.toml", "--machine", "v100"), "--machine", "v100", "a100"
    ),
}
