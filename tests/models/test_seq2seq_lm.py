"""Encoder-decoders: scores and losses are those that transformers computes for each prompt and answer alone."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import AutoPeftModelForSeq2SeqLM
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn import functional as F
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    FSMTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from zolightning.callbacks.micro_batches import micro_batches
from zolightning.evaluation.graph_validity import NetworkState
from zolightning.models.generation import generate
from zolightning.models.scoring import candidate_scores, classification_loss, language_modeling_loss
from zolightning.models.seq2seq_lm import Seq2SeqLM, target_features, target_log_probs
from zolightning.network.adapter_folders import save_adapter
from zolightning.network.adapters import add_adapter, lora_settings
from zolightning.optim import LOZO, MeZO, StepRecord, ZerothOrderOptimizer

# prompts of different lengths, answers of one to three tokens, and an example with a candidate less
EXAMPLES = [
    ([5, 9, 3, 17, 8, 22, 4, 1], [[6, 2, 1], [11, 1], [7, 12, 1]]),
    ([14, 3, 1], [[25, 1], [18, 9, 1]]),
    ([2, 31, 31, 6, 10, 1], [[6, 1], [35, 4, 1], [16, 1]]),
]
LABELS = [2, 0, 1]

_COMMON = {"vocab_size": 37, "d_model": 16, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
CONFIGS = {
    # weights far larger than usual, so that a wrong position or mask shows in the scores
    "t5": partial(T5Config, **_COMMON, d_kv=8, d_ff=24, num_layers=2, num_heads=2, initializer_factor=3.0),
    "t5-gated": partial(
        T5Config, **_COMMON, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    ),
    "bart": partial(
        BartConfig,
        **_COMMON,
        **{f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("layers", "attention_heads")},
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        forced_eos_token_id=None,
        init_std=0.3,
    ),
}


def make_model(architecture: str = "t5", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSeq2SeqLM.from_config(CONFIGS[architecture]()).eval().to(dtype)


def padded(rows: Sequence[Sequence[int]], fill: int, width: int) -> torch.Tensor:
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def make_batch(examples: Sequence[Any] = EXAMPLES, labels: Sequence[int] = LABELS) -> dict[str, Any]:
    longest = max(len(prompt) for prompt, _ in examples)
    count = max(len(answers) for _, answers in examples)
    width = max(len(answer) for _, answers in examples for answer in answers)
    return {
        "input_ids": padded([prompt for prompt, _ in examples], 0, longest)[:, None],
        "attention_mask": padded([[1] * len(prompt) for prompt, _ in examples], 0, longest)[:, None],
        "answer_ids": torch.stack([padded([*a, *[[]] * (count - len(a))], -1, width) for _, a in examples]),
        "label": torch.tensor(labels),
        "id": torch.arange(len(examples)),
        "objective": "classification",
    }


def alone(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """The mean log-probability of an answer, minus the loss that transformers computes."""
    return -model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).loss.item()


@pytest.mark.parametrize("architecture", CONFIGS)
@torch.no_grad()
def test_scores_are_minus_the_losses_of_transformers(architecture: str) -> None:
    model = make_model(architecture)
    batch = make_batch()
    log_probs, mask = target_log_probs(model, batch)
    scores = candidate_scores(log_probs, mask)
    expected = torch.full((3, 3), float("-inf"))
    for row, (prompt, answers) in enumerate(EXAMPLES):
        expected[row, : len(answers)] = torch.tensor([alone(model, prompt, answer) for answer in answers])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        classification_loss(scores, batch["label"]), F.cross_entropy(expected, batch["label"]), atol=1e-5, rtol=1e-5
    )
    # all tokens of the right answers weigh the same, as in transformers' loss of a batch
    labels = padded([answers[label] for (_, answers), label in zip(EXAMPLES, LABELS, strict=True)], -100, 3)
    together = model(batch["input_ids"][:, 0], batch["attention_mask"][:, 0], labels=labels).loss
    torch.testing.assert_close(language_modeling_loss(log_probs, mask, batch["label"]), together, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_each_prompt_is_encoded_once_and_parts_of_a_batch_score_as_the_whole() -> None:
    model, batch, rows = make_model(), make_batch(), []
    model.get_encoder().block[0].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    log_probs, _ = target_log_probs(model, batch)
    assert rows == [3]
    parts = torch.cat([target_log_probs(model, part)[0] for part in micro_batches(batch, 1)])
    torch.testing.assert_close(parts, log_probs, atol=1e-5, rtol=1e-5)
    assert not model.get_decoder()._forward_pre_hooks


@pytest.mark.parametrize("architecture", CONFIGS)
@torch.no_grad()
def test_features_are_what_the_head_reads_of_the_right_answers_alone(architecture: str) -> None:
    model = make_model(architecture)
    head = model.get_output_embeddings()
    features, tokens = target_features(model, head, make_batch())
    rights = [(prompt, answers[label]) for (prompt, answers), label in zip(EXAMPLES, LABELS, strict=True)]
    assert tokens.tolist() == [token for _, answer in rights for token in answer]
    alone = [model(torch.tensor([prompt]), labels=torch.tensor([answer])).logits[0] for prompt, answer in rights]
    torch.testing.assert_close(features @ head.weight.T, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_its_hook_is_one_that_graphs_hold() -> None:
    model, found = make_model(), []
    own, state = model.forward, NetworkState(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        found.append((state.hooked(), len(state.hooks())))
        return own(*args, **kwargs)

    model.forward = forward
    target_log_probs(model, make_batch())
    assert found == [(None, 1)]


def losses(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    return classification_loss(candidate_scores(*target_log_probs(model, batch)), batch["label"])


@pytest.mark.parametrize("architecture", ["t5", "bart"])
@pytest.mark.parametrize("method", [MeZO, partial(LOZO, rank=2, vector_lr=1e-3)])
@pytest.mark.filterwarnings("ignore:`update_precision`")
def test_evaluations_of_a_step_share_a_run_of_the_network(
    architecture: str, method: Callable[..., ZerothOrderOptimizer]
) -> None:
    """Both signs of a direction are rows of one run, and every loss is that of a run of its own."""

    def step(size: int) -> tuple[StepRecord, list[int]]:
        holder, rows = torch.nn.Module(), []
        holder.net = make_model(architecture)
        for name, parameter in holder.named_parameters():  # but what is read without the rows of a batch
            parameter.requires_grad_("relative_attention_bias" not in name and "embed_positions" not in name)
        optimizer = method(holder.parameters(), lr=1e-3, seed=0)
        optimizer.attach(holder, size)
        optimizer.estimate(partial(losses, holder.net, make_batch()))  # audits
        holder.net.get_encoder().register_forward_hook(lambda *given: rows.append(len(given[-1][0])))
        return optimizer.estimate(partial(losses, holder.net, make_batch())), rows

    (stacked, rows), (plain, apart) = step(2), step(1)
    assert (rows, apart) == ([6], [3, 3])
    assert stacked.losses == pytest.approx(plain.losses, rel=1e-5)
    assert stacked.projected_grads == pytest.approx(plain.projected_grads, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize(("trained", "runs"), [("decoder.block.1", [1, 1]), ("encoder.block.1", [1, 2])])
@pytest.mark.filterwarnings("ignore:`update_precision`")
def test_encoder_layers_below_what_trains_run_once_a_step(trained: str, runs: list[int]) -> None:
    def two_steps(share: bool) -> tuple[list[StepRecord], list[int]]:
        holder, found = torch.nn.Module(), [0, 0]
        holder.net = make_model()
        for name, parameter in holder.named_parameters():
            parameter.requires_grad_(name.startswith(f"net.{trained}."))
        for index, block in enumerate(holder.net.encoder.block):

            def counted(*args: Any, own: Callable[..., Any] = block.forward, at: int = index, **kwargs: Any) -> Any:
                found[at] += 1
                return own(*args, **kwargs)

            block.forward = counted
        optimizer = MeZO(holder.parameters(), lr=1e-3, seed=0)
        optimizer.attach(holder)
        if not share:
            optimizer.evaluator.prefix.layers = ()
        records = []
        for _ in range(2):
            found[:] = [0, 0]
            records.append(optimizer.estimate(partial(losses, holder.net, make_batch())))
            optimizer.step()
        return records, found

    (records, found), (expected, all_runs) = two_steps(True), two_steps(False)
    assert (found, all_runs) == (runs, [2, 2])
    assert records == expected


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT 0.21 with transformers 5.23
def test_peft_finds_the_base_model_of_an_adapter_by_itself(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    targets = [name for name, _ in model.named_modules() if name.endswith(".q")]
    add_adapter(model, lora_settings(2, 4.0, targets))
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")
    found = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    assert sum("lora_A" in name for name, _ in found.named_parameters()) == len(targets) > 0


@pytest.mark.parametrize("architecture", ["t5", "bart"])
@torch.no_grad()
def test_a_padded_batch_writes_what_each_prompt_alone_does(architecture: str) -> None:
    model = make_model(architecture)
    words = Tokenizer(WordLevel({"</s>": 1} | {f"w{number}": number for number in (0, *range(2, 37))}, unk_token="w2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="w0")
    prompts = [prompt for prompt, _ in EXAMPLES]
    width = max(map(len, prompts))
    ids, mask = padded(prompts, 0, width), padded([[1] * len(prompt) for prompt in prompts], 0, width)
    texts = generate(model, tokenizer, ids, mask, max_new_tokens=5, stop="\n")
    expected = []
    for prompt in prompts:
        written = [0]
        while len(written) < 6 and written[-1] != 1:
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([written])).logits
            written.append(logits[0, -1].argmax().item())
        expected.append(tokenizer.decode(written[1:], skip_special_tokens=True).strip())
    assert texts == expected
    assert len(set(expected)) > 1


def refuse_unsuitable(model: PreTrainedModel) -> None:
    Seq2SeqLM.refuse_unsuitable(cast(Seq2SeqLM, SimpleNamespace(model=model)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_networks_that_honour_the_mask_are_accepted(architecture: str, dtype: torch.dtype) -> None:
    model = make_model(architecture, dtype).train()
    refuse_unsuitable(model)
    assert model.training


def test_networks_that_give_other_scores_are_refused() -> None:
    model = make_model()
    unmasked = {"attention_mask": None}
    model.get_encoder().register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | unmasked), with_kwargs=True)
    with pytest.raises(MisconfigurationException, match="T5ForConditionalGeneration, which does not mask padding"):
        refuse_unsuitable(model)
    sizes = {f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    vocabularies = {"langs": ["a", "b"], "src_vocab_size": 37, "tgt_vocab_size": 37}
    config = FSMTConfig(**vocabularies, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **sizes)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(MisconfigurationException, match=r"FSMT.* not read a prompt and several answers \(ValueError"):
        refuse_unsuitable(model)
