"""Kept prefixes: a hit is what computing gives, a miss whenever anything that decides the result is another."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from small_runs import SMALL, door, refused, small_pipeline, train

import tc_lightning as tc
from tc_lightning.noise import gaussian
from tc_lightning.prefix import PrefixCache, fingerprint, key_of, prefix_length, weights_digest
from tc_lightning.records import RecordStore

PROMPTS, SEEDS = ["a red circle", "a blue cross on the left", "ein Kreis"], [1, 2, 2**62]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    small_pipeline(place)
    return place


@pytest.fixture
def make(pipeline):
    def build(cache=None, backbone=None, text_encoder="full", unet="frozen", **options):
        backbone = (backbone or tc.Backbone.load(pipeline)).tune(text_encoder, unet, rank=2)
        reward = tc.RewardMix(brightness=tc.rewards.FunctionReward(lambda images, p: images.mean((1, 2, 3)), differentiable=True))
        options = {"schedule": tc.LastK(1), "steps": 3, "guidance_scale": 3.0, "prefix": cache} | options
        module = tc.TextCraftor(backbone, reward, **options)
        module.log = module.log_dict = lambda *args, **kwargs: None
        return module

    return build


class Calls:
    """Counts the calls of a module, and the rows that they had."""

    def __init__(self, module):
        self.rows = []
        module.register_forward_pre_hook(lambda _, args: self.rows.append(len(args[0])))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_hit_gives_the_same_bits_as_the_miss_before_it(dtype, make, tmp_path):
    module = make(PrefixCache(tmp_path, dtype=dtype))
    calls = Calls(module.backbone.unet)
    cold, start = module.enter(PROMPTS, SEEDS)
    assert (start, calls.rows) == (2, [6, 6]) and (module.prefix.hits, module.prefix.misses) == (0, 3)
    again, _ = module.enter(PROMPTS[::-1], SEEDS[::-1])
    warm, _ = make(PrefixCache(tmp_path, dtype=dtype)).enter(PROMPTS, SEEDS)
    assert torch.equal(again.flip(0), cold) and torch.equal(warm, cold) and len(calls.rows) == 2
    computed = module.run_prefix(PROMPTS, SEEDS)
    assert torch.equal(warm, computed.to(getattr(torch, dtype)).float())
    if dtype == "float32":
        with torch.no_grad():
            x = gaussian(SEEDS, module.backbone.latent_shape)
            assert torch.equal(warm, module.chain.run(x, module.condition(PROMPTS), 0, 2))


def test_only_what_is_absent_is_computed(make, tmp_path):
    module = make(PrefixCache(tmp_path))
    module.enter(PROMPTS[:2], SEEDS[:2])
    calls = Calls(module.backbone.unet)
    module.enter(PROMPTS, SEEDS)
    assert calls.rows == [2, 2] and module.prefix.hits == 2 and module.prefix.hit_rate == pytest.approx(2 / 3)
    assert len({key_of(prompt, seed) for prompt in PROMPTS for seed in SEEDS}) == 9
    module.enter([PROMPTS[0]], [SEEDS[1]])
    assert module.prefix.misses == 4, "the same prompt with another seed"


def changed_config(part, **values):
    def change(backbone):
        model = getattr(backbone, part)
        model = copy.deepcopy(model)
        for name, value in values.items():
            if part == "unet":
                model.register_to_config(**{name: value})
            else:
                setattr(model.config, name, value)
        setattr(backbone, part, model)

    return change


def nudged(part):
    """One weight by one part in a million."""

    def change(backbone):
        list(getattr(backbone, part).parameters())[-1].data.view(-1)[0] += 1e-6

    return change


def other_noise(**values):
    def change(backbone):
        kind = type(backbone.noise_scheduler)
        backbone.noise_scheduler = kind.from_config(backbone.noise_scheduler.config, **values)

    return change


def shorter_tokens(backbone):
    backbone.tokenizer.model_max_length = 16


BACKBONE_CHANGES = {
    "unet": nudged("unet"),
    "unet_config": changed_config("unet", norm_eps=1e-4),
    "text_encoder": nudged("text_encoder"),
    "text_encoder_config": changed_config("text_encoder", layer_norm_eps=1e-4),
    "tokenizer": shorter_tokens,
    "alpha_bars": other_noise(beta_end=0.013),
    "prediction_type": other_noise(prediction_type="v_prediction"),
    "shape": lambda backbone: backbone.source.update(image_size=32),
}
OPTION_CHANGES = {
    "guidance_scale": {"guidance_scale": 3.5},
    "length": {"schedule": tc.LastK(2)},
    "steps": {"steps": 4, "schedule": tc.LastK(2)},
    "timesteps": {"timestep_spacing": "leading"},
}


@pytest.fixture
def kept(make, tmp_path):
    """A folder with records of the plain settings, and their fields."""
    module = make(PrefixCache(tmp_path))
    module.enter(PROMPTS, SEEDS)
    return tmp_path, json.loads((module.prefix.store.folder / "fingerprint.json").read_text())


def assert_misses(module, kept, field):
    folder, before = kept
    module.open_prefix()
    after = json.loads((module.prefix.store.folder / "fingerprint.json").read_text())
    assert field in {name for name in before if before[name] != after[name]}
    module.enter(PROMPTS, SEEDS)
    assert (module.prefix.hits, module.prefix.misses) == (0, 3)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("field", BACKBONE_CHANGES)
def test_another_model_misses(field, kept, make, pipeline):
    backbone = tc.Backbone.load(pipeline)
    BACKBONE_CHANGES[field](backbone)
    assert_misses(make(PrefixCache(kept[0]), backbone), kept, field)


@pytest.mark.parametrize("field", OPTION_CHANGES)
def test_other_settings_miss(field, kept, make):
    assert_misses(make(PrefixCache(kept[0]), **OPTION_CHANGES[field]), kept, field)


def test_another_storage_misses(kept, make):
    assert_misses(make(PrefixCache(kept[0], dtype="float16")), kept, "storage")


def test_another_arithmetic_misses(kept, make):
    with torch.autocast("cpu", torch.bfloat16):
        assert_misses(make(PrefixCache(kept[0])), kept, "arithmetic")


@pytest.mark.parametrize("kind", ["double", "channels_last", "compiled", "matmul"])
def test_each_part_of_the_arithmetic_counts(kind, make, monkeypatch):
    from tc_lightning.prefix import arithmetic

    unet = make().backbone.unet
    before = arithmetic(unet)
    if kind == "double":
        unet.double()
    elif kind == "channels_last":
        unet.to(memory_format=torch.channels_last)
    elif kind == "compiled":
        unet.compile()
    else:
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert sum(before[name] != value for name, value in arithmetic(unet).items()) == 1


def test_every_field_is_covered_by_a_change(kept):
    """A field added later must be added to the changes too."""
    assert set(kept[1]) == {*BACKBONE_CHANGES, *OPTION_CHANGES, "storage", "arithmetic", "version"}


def test_what_does_not_matter_hits(kept, make, pipeline):
    """Rewards, constraint, the tuned weights, LoRA or full, another folder with the same model."""
    backbone = tc.Backbone.load(pipeline)
    backbone.source["source"] = "elsewhere"
    backbone.unet.register_to_config(_name_or_path="elsewhere")
    module = make(PrefixCache(kept[0]), backbone, text_encoder="lora", tuned_fraction=0.3, keep_activations="all")
    with torch.no_grad():
        for name, parameter in module.backbone.text_encoder.named_parameters():
            parameter.add_(0.1 if "lora_B" in name else 0.0)
    module.enter(PROMPTS, SEEDS)
    assert (module.prefix.hits, module.prefix.misses) == (3, 0)


def test_an_adapter_that_says_something_counts(pipeline):
    backbone = tc.Backbone.load(pipeline)
    plain = weights_digest(backbone.text_encoder)
    backbone.tune("lora", rank=2)
    assert weights_digest(backbone.text_encoder) == plain
    next(p for n, p in backbone.text_encoder.named_parameters() if "lora_B" in n).data += 0.1
    assert weights_digest(backbone.text_encoder) != plain


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unet": "lora"}, "with tune.unet=lora they change at every step: cache.dir=null"),
        ({"unet": "full", "text_encoder": "frozen"}, "with tune.unet=full they change"),
        ({"schedule": tc.FullChain()}, "the tuned text is seen from the first step on. cache.dir=null"),
        ({"schedule": tc.LastK(3)}, "this schedule has none"),
    ],
)
def test_refused_where_it_would_be_wrong(options, words, make, tmp_path):
    with pytest.raises(ValueError, match=words):
        make(PrefixCache(tmp_path), **options)


@pytest.mark.parametrize("method", ["DDPO", "Direct"])
def test_methods_that_sample_with_the_weights_of_the_moment_are_refused(method):
    from omegaconf import OmegaConf

    from tc_lightning.cli.build import build_prefix

    cfg = OmegaConf.create(
        {"cache": {"dir": "x", "max_gb": None, "dtype": "float32"}, "method": {"_target_": f"tc_lightning.{method}"}}
    )
    with pytest.raises(ValueError, match=f"{method} has none: .* cache.dir=null"):
        build_prefix(cfg)
    cfg.method._target_ = "tc_lightning.TextCraftor"
    assert isinstance(build_prefix(cfg), PrefixCache)


def test_length_is_what_neither_gradient_nor_tuned_text_reaches():
    assert (prefix_length(20, 20), prefix_length(20, 10), prefix_length(5, 20)) == (20, 10, 5)


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"max_gb": 0}, {"max_gb": -1.0}])
def test_bad_settings_name_their_key(options, tmp_path):
    with pytest.raises(ValueError, match=f"cache.{next(iter(options))}="):
        PrefixCache(tmp_path, **options)


def test_fingerprint_is_of_the_original_and_not_of_what_learns(make):
    module = make()
    before = fingerprint(module.backbone, module.original, module.chain, 2)
    with torch.no_grad():
        for parameter in module.backbone.text_encoder.parameters():
            parameter.add_(1.0)
    assert fingerprint(module.backbone, module.original, module.chain, 2) == before


RUN = (*SMALL, "prompts.seeds_per_prompt=1", "prompts.train=4", "max_steps=4", "val.every=0", "prompts.heldout=2")


def outcome(folder):
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state, (folder / "metrics.csv").read_text(), json.loads((folder / "run.json").read_text())


@pytest.mark.full
def test_runs_without_with_cold_and_with_warm_store_are_equal_to_the_bit(tmp_path):
    """Two epochs of two batches: the second epoch reads what the first has kept."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, cache in (("without", "null"), ("cold", tmp_path / "cache"), ("warm", tmp_path / "cache")):
            train(tmp_path / name, *RUN[len(SMALL) :], f"cache.dir={cache}")
    finally:
        torch.set_num_threads(threads)
    (plain, _, _), (cold, _, first), (warm, _, second) = (outcome(tmp_path / name) for name in ("without", "cold", "warm"))
    assert (first["prefix"]["hits"], first["prefix"]["misses"]) == (4, 4)
    assert (second["prefix"]["hits"], second["prefix"]["misses"]) == (8, 0)
    for other in (cold, warm):
        assert plain.keys() == other.keys() and all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.full
def test_the_verb_fills_what_train_reads_and_continues_where_it_stopped(tmp_path):
    cache = f"cache.dir={tmp_path / 'cache'}"
    done = door("prefix", *RUN, cache, "max_steps=1", f"hydra.run.dir={tmp_path / 'one'}")
    assert done.status == 0, done.err
    assert "2 of 3, the same in every epoch" in done.out and "2 x 2,048 B = 0.0041 MB (float32), 0 kept already" in done.out
    done = door("prefix", *RUN, cache, f"hydra.run.dir={tmp_path / 'two'}")
    assert done.status == 0 and "2 kept already" in done.out, done.err
    card = json.loads((tmp_path / "two" / "run.json").read_text())
    assert (card["status"], card["samples"], card["records"]) == ("finished", 2, 4)
    found = train(tmp_path / "train", *RUN[len(SMALL) :], cache)["prefix"]
    assert (found["hits"], found["misses"]) == (8, 0)
    refused(door("prefix", *RUN, cache, f"hydra.run.dir={tmp_path / 'two'}"), "holds a run already")


@pytest.mark.full
def test_two_fill_one_store_and_compute_nothing_twice(tmp_path):
    command = [sys.executable, "-m", "tc_lightning", "prefix", *RUN, "prompts.train=24", "max_steps=12", f"cache.dir={tmp_path}"]
    both = [
        subprocess.Popen([*command, f"hydra.run.dir={tmp_path / 'runs' / str(number)}"], stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    for process in both:
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0, out
    cards = [json.loads((tmp_path / "runs" / str(number) / "run.json").read_text()) for number in range(2)]
    (folder,) = {card["folder"] for card in cards}
    assert sum(card["samples"] for card in cards) == 24 == len(RecordStore(folder, 2048))


def test_the_verb_refuses_what_train_refuses():
    refused(door("prefix", *SMALL), "cache.dir")
    refused(door("prefix", *SMALL, "cache.dir=x", "cache.dtype=int8"), "cache.dtype=int8: accepted are float32")
    refused(door("train", *SMALL, "cache.dir=x", "schedule.k=3"), "this schedule has none")
