"""The page of a job's file, from the classes of ngd_workers.contract.spec, with an example of every field."""

import json
from typing import Any

import yaml
from model_tables import body, classes, section
from pydantic import BaseModel, TypeAdapter

from ngd_dist.config import NGDConfig, SNGDConfig
from ngd_workers.contract.spec import JobSpec, LoopSpec

__all__ = ["page"]

HEAD = """\
<!-- Written by docs/reference/job_page.py from ngd_workers/contract/spec: change it there. -->
# The job file

A job is one YAML or JSON file: the argument of `ngd submit`, `ngd train` and `ngd plan`, and the body of
`POST /api/v1/jobs`. An unknown field or a value out of bounds is refused with the field, its value, the bound and the
remedy. `workers/ngd_workers/recipes` has whole files that run; [your job in ten minutes](../start/your-job.md) begins
with one.

Where several things can fill a field, each has a name, its `kind`. After each table stands an example with every field:
at its default, or in a comment where it is unset unless you set it.
"""
OF_EACH_JOB = {
    "labels": {"team": "vision"},
    "code": {"directory": "."},
    "image": "registry.example/ml/mine:2",
    "env": {"FLAVOUR": "plain"},
    "secrets": {"HF_TOKEN": "hub"},
}
# What stands in an example for a field that has to be given, or that is unset unless it is given.
GIVEN: dict[str, dict[str, Any]] = {
    "JobSpec": {
        "name": "digits",
        "model": {"kind": "small_cnn"},
        "data": {"kind": "digits"},
        "optimizer": {"kind": "ngd"},
        "schedule": {"epochs": 10},
        "batch": {"global_size": 256},
        "target": {"metric": "accuracy", "value": 0.97},
        **OF_EACH_JOB,
        "init_from": {"kind": "file", "path": "weights/start.safetensors"},
        "transform": {"kind": "sngd"},
        "engine": {"kind": "ddp"},
    },
    "LoopSpec": {
        "name": "my-loop",
        "train": {"function": "mine:train", "metrics": {"loss": "lower"}},
        "target": {"metric": "loss", "value": 0.1},
        **OF_EACH_JOB,
        "init_from": {"kind": "checkpoint", "run_dir": "job_01J9ZQ7R8T"},
    },
    "OwnLoop": {"function": "mine:train", "options": {"width": 64}, "steps": 200, "metrics": {"loss": "lower"}},
    "OwnMetric": {"better": "higher"},
    "Resources": {"min_workers": 2, "max_workers": 8},
    "Target": {"metric": "accuracy", "value": 0.97},
    "Code": {
        "include": ["vocabulary.txt"],
        "exclude": ["notebooks/"],
        "requirements": "requirements.txt",
        "sha256": "0" * 64,
    },
    "Torchvision": {"name": "resnet50", "options": {"zero_init_residual": True}},
    "Timm": {"name": "vit_tiny_patch16_224", "options": {"drop_path_rate": 0.1}},
    "Transformers": {"name": "GPT2LMHeadModel", "options": {"n_layer": 4}},
    "UserModel": {"function": "mine:model", "options": {"width": 64}},
    "UserData": {"function": "mine:data", "options": {"samples": 3000}},
    "UserTask": {"function": "mine:loss", "options": {"margin": 0.2}},
    "InitFromFile": {"path": "weights/start.safetensors", "ignore": ["head.*"]},
    "InitFromCheckpoint": {"run_dir": "job_01J9ZQ7R8T", "step": 200, "ignore": ["head.*"]},
    "IDX": {"directory": "fashion-mnist"},
    "ImageFolder": {"directory": "imagenette"},
    "ImageSettings": {"resize": 256},
    "WebDataset": {
        "directory": "s3://bucket/imagenet",
        "lanes": 64,
        "cache": {"directory": "/local/cache", "bytes": 100_000_000_000},
        "storage_options": {"anon": True},
    },
    "ShardCache": {"directory": "/local/cache", "bytes": 100_000_000_000},
    "JpegNpz": {"file": "cifar10.npz", "train_samples": 50_000},
    "Parquet": {
        "train": ["train"],
        "test": ["test.parquet"],
        "features": ["age", "income"],
        "target": ["price"],
        "image": "image",
        "label": "label",
        "classes": 10,
        "images": {"size": 224},
    },
    "HuggingFace": {
        "directory": "housing",
        "features": ["age", "income"],
        "target": ["price"],
        "image": "image",
        "label": "label",
        "classes": 10,
        "images": {"size": 224},
    },
    "Tokens": {
        "train": "text/train.txt",
        "length": 128,
        "test": "text/valid.txt",
        "test_fraction": 0.1,
        "tokenizer": {"kind": "bpe"},
        "vocabulary": 50_257,
        "dtype": "uint16",
    },
    "WordTokenizer": {"max_words": 10_000},
    "TokenizerFile": {"path": "text/tokenizer.json"},
    "TextPairs": {"directory": "multi30k", "source": "en", "target": "de", "target_tokenizer": {"kind": "bpe"}},
    "ImageClassification": {"mixup": {"alpha": 0.2}, "erasing": {"probability": 0.25}},
    "Mixup": {"alpha": 0.2},
    "Labelling": {"classes": 21},
    "Regression": {"outputs": 1},
    "Translation": {"max_length": 64},
    "NGDOptimizer": {
        "strategy": {"kind": "owner_sharded"},
        "step_length": {"kind": "given"},
        "clip": {"kind": "kl", "max_kl": 0.01},
        "fallback": {"kind": "adamw", "lr": 0.003},
        "max_failed_inversions": 10,
        "refresh_cap": 8,
        "exclude": ["head"],
    },
    "SNGDTransform": {"exclude": ["head"]},
    "DeepSpeed": {"config": {"zero_optimization": {"stage": 1}}},
    "Schedule": {"epochs": 10, "steps": 1000, "evaluate_every_steps": 50},
    "Batch": {"global_size": 256, "micro_size": 64},
}

# One of several fields has to be given: these are, and the others stand in comments.
CHOSEN = {
    "Schedule": {"epochs"},
    "Tokens": {"test", "tokenizer"},
    "Parquet": {"features", "target"},
    "HuggingFace": {"features", "target"},
}


def page() -> str:
    """Returns the whole page: the parts of a job, then for each part the classes that can fill it."""
    elsewhere = dict.fromkeys(_of_the_library(), "../configuration.md")
    written = {JobSpec, LoopSpec}
    parts = [HEAD]
    for title, spec in (("A job", JobSpec), ("A job with a loop of its own", LoopSpec)):
        parts += [f"## {title}\n", *body(spec, elsewhere), example(spec)]
        for name, field in spec.model_fields.items():
            sections = [line for model in classes(field.annotation)
                        for line in section(model, "####", written, example, elsewhere)]  # fmt: skip
            parts += [f"### {name}\n", *sections] if sections else []
    return "\n".join(parts)


def _of_the_library() -> set[type[BaseModel]]:
    found, waiting = set[type[BaseModel]](), [NGDConfig, SNGDConfig]
    while waiting:
        model = waiting.pop()
        if model not in found:
            found.add(model)
            waiting += [choice for field in model.model_fields.values() for choice in classes(field.annotation)]
    return found - {NGDConfig}


def example(model: type[BaseModel]) -> str:
    """Returns a whole example in YAML. Raises: ValueError if the class, or one of its fields, would refuse it."""
    given, lines = GIVEN.get(model.__name__, {}), list[str]()
    if unknown := given.keys() - model.model_fields.keys():
        raise ValueError(f"{model.__name__} has no {sorted(unknown)}")
    chosen = CHOSEN.get(model.__name__, set())
    needed = {name: given[name] for name, field in model.model_fields.items() if field.is_required() or name in chosen}
    defaults = TypeAdapter(model).dump_python(model.model_construct(), mode="json", warnings=False)
    for name, field in model.model_fields.items():
        is_unset = name not in needed and field.default in (None, {}, (), [])
        if is_unset and name not in given:
            raise ValueError(f"GIVEN has no example of {model.__name__}.{name}")
        value = given.get(name, defaults.get(name))
        TypeAdapter(field.annotation).validate_json(json.dumps(value))
        flow = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
        line = f"{name}: {flow.partition(chr(10))[0]}"  # after a number YAML ends the document in a line of its own
        lines.append(f"# {line}" if is_unset else line)
    model.model_validate_json(json.dumps(needed))
    return "\n".join(["```yaml", *lines, "```\n"])
