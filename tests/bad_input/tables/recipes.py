"""Recipes of fine-tuning, and the folder of an unfinished run."""

import json

from cases import FINETUNE, Case, both, pipe, text

WITH = f"{FINETUNE} --config recipe.yaml"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

RECIPES = {
    "unknown key": ("batchsize: 4", "batchsize"),
    "no mapping": ("- 4", "key: value"),
    "a number": ("4", "key: value"),
    "a list of keys": ("[batch_size, seed]", "key: value"),
    "broken": ("batch_size: [1", "cannot read the recipe"),
    "tabs": ("\tbatch_size: 1", "cannot read the recipe"),
    "not text": (b"\xff\xfe\x00batch", "cannot read the recipe"),
    "zero bytes in it": (b"seed: 1\x00", "cannot read the recipe"),
    "a program": ("!!python/object/apply:os.system [touch trace]", "cannot read the recipe"),
    "a program for a value": ("seed: !!python/object/apply:os.getpid []", "cannot read the recipe"),
    "an alias bomb": (BOMB + "trains: *i", "alias"),
    "an alias bomb in the arguments": (BOMB + "training_arguments: {x: *i}", "alias"),
    "an alias of itself": ("training_arguments: &a {x: *a}", "alias"),
    "deep nesting": ("trains: " + "[" * 20_000 + "]" * 20_000, "cannot read the recipe"),
    "deep mappings": ("{a: " * 5_000 + "1" + "}" * 5_000, "cannot read the recipe"),
    "a number of thousands of digits": ("seed: " + "9" * 10_000, "cannot read the recipe"),
    "a date that is none": ("seed: 2026-13-45", "cannot read the recipe"),
    "two documents": ("seed: 1\n---\nseed: 2", "cannot read the recipe"),
    "a key twice": ("seed: 1\nseed: 2", "twice"),
    "a key that is a list": ("? [a]\n: 1", "cannot read the recipe"),
    "a key that is a number": ("1: 2", "unknown key"),
    "a key that is nothing": ("~: 2", "unknown key"),
    "far too long": ("# " + "x" * 2_000_000, "too large"),
    "text for a number": ("batch_size: many", "batch_size = 'many'"),
    "a rate that YAML reads as text": ("learning_rate: 1e-5", "write 1.0e-5"),
    "a rate that is no number": ("learning_rate: .nan", "learning_rate = nan"),
    "a rate without end": ("learning_rate: .inf", "learning_rate = inf"),
    "a rate below 0": ("learning_rate: -1.0e-3", "learning_rate = -0.001"),
    "a rate of 0": ("learning_rate: 0.0", "learning_rate = 0.0"),
    "yes for a number": ("seed: yes", "seed = True"),
    "a number for yes": ("shuffle: 1", "shuffle = 1"),
    "text for yes": ("bf16: 'yes'", "bf16 = 'yes'"),
    "a list for text": ("trains: [all]", "trains = ['all']"),
    "a long list for text": ("trains: [" + "all, " * 5_000 + "all]", "trains = "),
    "an unknown policy": ("trains: everything", "everything"),
    "an unknown dtype": ("dtype: float8", "float8"),
    "an unknown attention": ("attn_implementation: fast", "fast"),
    "an attention that is not installed": ("attn_implementation: flash_attention_2", "FlashAttention2"),
    "an unknown way with bad chats": ("on_bad_record: maybe", "maybe"),
    "no epochs": ("epochs: 0", "epochs = 0"),
    "epochs without end": ("epochs: .inf", "epochs = inf"),
    "steps below 0": ("max_steps: -1", "max_steps = -1"),
    "steps beyond count": ("max_steps: 100000000000000000000", "max_steps = 100"),
    "a batch of nothing": ("batch_size: 0", "batch_size = 0"),
    "a batch beyond count": ("batch_size: 100000000000000000000", "batch_size = 100"),
    "accumulation below 0": ("gradient_accumulation: -4", "gradient_accumulation = -4"),
    "a length of nothing": ("max_length: 0", "max_length = 0"),
    "a seed below 0": ("seed: -1", "seed = -1"),
    "a seed beyond count": ("seed: 100000000000000000000", "seed = 100"),
    "workers below 0": ("workers: -1", "workers = -1"),
    "more workers than a machine has": ("workers: 100000", "workers = 100000"),
    "adapters of no rank": ("lora_rank: 0", "lora_rank = 0"),
    "adapters wider than the model": ("lora_rank: 1000000000", "lora_rank"),
    "a share over 1": ("distillation: 1.5", "distillation = 1.5"),
    "a share that is no number": ("warmup: .nan", "warmup = nan"),
    "a share below 0": ("alignment: -0.1", "alignment = -0.1"),
    "shares of more than all": ("warmup: 0.6\ndecay: 0.6", "warmup and decay"),
    "a weight below 0": ("attention_loss: -1", "attention_loss = -1"),
    "a weight that is no number": ("attention_loss: .nan", "attention_loss = nan"),
    "weight decay that is no number": ("weight_decay: .nan", "weight_decay = nan"),
    "weight decay below 0": ("weight_decay: -0.1", "weight_decay = -0.1"),
    "bfloat16 without autocast": ("bf16: false\ndtype: bfloat16", "bf16"),
    "arguments that are a number": ("training_arguments: 5", "training_arguments = 5"),
    "an unknown argument": ("training_arguments: {fast: true}", "fast"),
    "an argument of another kind": ("training_arguments: {save_steps: often}", "save_steps"),
    "an argument that is a list": ("training_arguments: {max_grad_norm: [1]}", "max_grad_norm"),
    "an unknown optimiser": ("training_arguments: {optim: best}", "best"),
    "an unknown schedule": ("training_arguments: {lr_scheduler_type: best}", "best"),
    "the work folder elsewhere": ("training_arguments: {output_dir: data}", "output_dir"),
    "the work folder above": ("training_arguments: {output_dir: ..}", "output_dir"),
    "no checkpoints to resume from": ("training_arguments: {save_strategy: 'no'}", "save_strategy"),
    "columns dropped": ("training_arguments: {remove_unused_columns: true}", "remove_unused_columns"),
    "a rate beside the recipe's": ("training_arguments: {learning_rate: 1.0}", "learning_rate"),
    "a seed beside the recipe's": ("training_arguments: {seed: 3}", "seed"),
    "a model from elsewhere": (
        "training_arguments: {resume_from_checkpoint: data}",
        "resume_from_checkpoint",
    ),
    "a service that is not installed": ("training_arguments: {report_to: clearml}", "clearml"),
    "an unknown service": ("training_arguments: {report_to: nowhere}", "nowhere"),
    "a norm below 0": ("training_arguments: {max_grad_norm: -1}", "max_grad_norm"),
    "a norm that is no number": ("training_arguments: {max_grad_norm: .nan}", "max_grad_norm"),
    "a moment over 1": ("training_arguments: {adam_beta1: 2.0}", "adam_beta1"),
}
STATE = {"settings": {}, "chosen": {"train": [0, 1, 2], "held_out": [3]}}
STATES = {
    "other settings": (json.dumps(STATE), "other settings"),
    "no settings": ("{}", "holds no unfinished run"),
    "a list": ("[]", "holds no unfinished run"),
    "a number": ("7", "holds no unfinished run"),
    "broken": ('{"settings": ', "holds no unfinished run"),
    "empty": ("", "holds no unfinished run"),
    "settings that are text": ('{"settings": "x", "chosen": {}}', "holds no unfinished run"),
    "deep nesting": ("[" * 100_000, "holds no unfinished run"),
    "not text": (b"\xff\xfe", "holds no unfinished run"),
}
CASES = {
    **{
        name: Case(command=WITH, change=text("recipe.yaml", content), named=named)
        for name, (content, named) in RECIPES.items()
    },
    **{
        f"state: {name}": Case(command=FINETUNE, change=text("out.partial/state.json", content), named=named)
        for name, (content, named) in STATES.items()
    },
    "no file": Case(command=WITH, named="recipe.yaml"),
    "a name that does not ship": Case(command=f"{FINETUNE} --config zoo/stage9", named="zoo/single_stage"),
    "a config of accelerate": Case(command=f"{FINETUNE} --config accelerate/ddp", named="zoo/single_stage"),
    "a name above the recipes": Case(command=f"{FINETUNE} --config ../config", named="zoo/single_stage"),
    "the path of one that does not ship": Case(command="recipes zoo/stage9", named="accelerate/ddp"),
    "a folder": Case(command=f"{FINETUNE} --config data", named="data"),
    "a pipe": Case(command=WITH, change=pipe("recipe.yaml"), named="recipe.yaml"),
    "a device": Case(command=f"{FINETUNE} --config /dev/zero", named="/dev/zero"),
    "an option over a recipe": Case(
        command=f"{WITH} --batch-size 0", change=text("recipe.yaml", "seed: 1"), named="batch_size = 0"
    ),
    "a work folder that is a file": Case(
        command=FINETUNE, change=text("out.partial", "mine"), named="out.partial"
    ),
    "a work folder of something else": Case(
        command=FINETUNE, change=text("out.partial/mine.txt", "mine"), named="out.partial"
    ),
    "its checkpoint without a number": Case(
        command=FINETUNE,
        change=both(
            text("out.partial/state.json", json.dumps(STATE)),
            text("out.partial/checkpoint-x/mine.txt", "mine"),
        ),
        named="out.partial",
    ),
}
