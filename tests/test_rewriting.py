"""Prompt engineering: what each rewriter gives, that it is a function of the prompt alone, and its way through the verbs."""

import json

import pytest
import torch
from small_runs import door, refused, small_language_model

import tc_lightning as tc
from tc_lightning.rewriting import MODIFIERS, LanguageModel, Modifiers
from tc_lightning.sampling import Sampler
from tc_lightning.tiny.model import SAMPLING

PROMPTS = ["a red circle", "a blue cross on the left"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_language_model(tmp_path_factory.mktemp("gpt2"))


def test_modifiers():
    assert Modifiers(["sharp", "red"])(PROMPTS) == [f"{prompt}, sharp, red" for prompt in PROMPTS]
    assert Modifiers(["sharp"], front=True)(PROMPTS[:1]) == ["sharp, a red circle"]
    assert Modifiers()(["x"]) == ["x, " + ", ".join(MODIFIERS)]
    for words in ([], "sharp"):
        with pytest.raises(ValueError, match="accepted is a list of words, at least one"):
            Modifiers(words)


def test_what_a_language_model_writes_is_what_transformers_writes(model):
    """Greedy, against a hand-written loop over the logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rewriter = LanguageModel(model, temperature=0, max_new_tokens=6)
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(-1)], dim=1)
    written = " ".join(tokenizer.decode(ids[0, length:], skip_special_tokens=True).split())
    assert written and rewriter(PROMPTS[:1])[0].replace(" ", "") == (PROMPTS[0] + written).replace(" ", "")
    assert LanguageModel(model, temperature=0, max_new_tokens=6, keep_prompt=False)(PROMPTS[:1]) == [written]


def test_draws_depend_on_the_prompt_and_the_seed_alone(model):
    state = torch.get_rng_state()
    first = LanguageModel(model, max_new_tokens=8)(PROMPTS)
    assert LanguageModel(model, max_new_tokens=8)(PROMPTS[::-1]) == first[::-1]
    assert LanguageModel(model, max_new_tokens=8, seed=1)(PROMPTS) != first
    assert all(text.startswith(prompt) and text != prompt for text, prompt in zip(first, PROMPTS, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_a_template_and_beams(model):
    rewriter = LanguageModel(model, template="{prompt} Rephrase:", keep_prompt=False, temperature=0, beams=3, max_new_tokens=4)
    assert len(rewriter(PROMPTS)) == 2 and rewriter(PROMPTS) == rewriter(PROMPTS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"template": "say"}, r"rewriter.template='say': accepted is a text with \{prompt\}"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"beams": 0}, "beams=0"),
        ({"checkpoint": "nowhere/at-all"}, "could not load the language model nowhere/at-all.*rewriter=modifiers"),
    ],
)
def test_refusals(options, words, model):
    with pytest.raises(ValueError, match=words):
        LanguageModel(**{"checkpoint": model, **options})


def test_a_sampler_tells_the_model_the_rewritten_prompts():
    backbone, options = tc.Backbone.load("tiny"), {**SAMPLING, "steps": 2}
    rewritten = Sampler(backbone, **options, rewriter=Modifiers(["gray background"]))(PROMPTS, [1, 2])
    by_hand = Sampler(backbone, **options)([f"{prompt}, gray background" for prompt in PROMPTS], [1, 2])
    assert torch.equal(rewritten, by_hand)


@pytest.mark.full
def test_evaluate_sets_both_beside_each_other(tmp_path, model):
    folder = tmp_path / "run"
    options = ("chain.steps=2", "bench.limit=3", "seeds=1", "shown=1", "reward=[tiny_clip]", f"hydra.run.dir={folder}")
    language_model = ("rewriter=language_model", f"rewriter.checkpoint={model}", "rewriter.max_new_tokens=3")
    done = door("evaluate", "run=tiny", *language_model, *options)
    assert done.status == 0, done.err
    found = json.loads((folder / "scores.json").read_text())
    assert list(found["models"]) == ["tiny", "tiny + language_model"] and found["prompts"] == 3
    refused(door("evaluate", "run=tiny", "rewriter=modifiers", *options), "holds another evaluation")


@pytest.mark.full
def test_generate_keeps_what_was_told(tmp_path):
    folder = tmp_path / "run"
    words = "rewriter.words=[gray background]"
    done = door(
        "generate", "run=tiny", 'text=["a red circle"]', "seeds=[1]", "rewriter=modifiers", words, f"hydra.run.dir={folder}"
    )
    assert done.status == 0, done.err
    card = json.loads((folder / "run.json").read_text())
    assert card["prompts"] == ["a red circle"] and card["rewritten"] == ["a red circle, gray background"]
