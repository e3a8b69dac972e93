"""Scores and losses of candidate answers."""

from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import nn

from waits import Waits
from zolightning.callbacks.micro_batches import micro_batches
from zolightning.data.batch import collate
from zolightning.data.encoding import Example
from zolightning.models import (
    answer_log_probs,
    candidate_scores,
    classification_loss,
    language_modeling_loss,
)
from zolightning.models.scoring import calibrated_scores

# prompts of different lengths, answers of one to three tokens, and an example with a candidate less
EXAMPLES = [
    ([5, 9, 3, 17, 8, 22, 4], [[6, 2], [11], [7, 12, 30]]),
    ([14, 3], [[25], [18, 9]]),
    ([2, 31, 31, 6, 10], [[6], [35, 4], [16, 13, 1]]),
]
ONE_TOKEN = [([5, 9, 3, 17, 8, 22, 4], [[6], [11]]), ([14, 3], [[11], [6]]), ([2, 31, 6], [[20], [33]])]
LABELS = [2, 0, 1]


class Bigram(nn.Module):
    """The next token depends on the current one only, by a table that a test can read."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.randn(37, 37, generator=torch.Generator().manual_seed(3))
        self.table = nn.Parameter(table)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.table[input_ids])

    def log_prob(self, previous: int, token: int) -> float:
        return torch.log_softmax(self.table.detach().double(), dim=-1)[previous, token].item()


def scores_of(model, batch):
    with torch.no_grad():
        return candidate_scores(*answer_log_probs(model, batch))


def alone(model, prompt: list[int], answer: list[int]) -> float:
    """The score of one candidate without a batch, padding, positions, or a choice of logits."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].float()
    log_probs = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
    return log_probs[range(len(answer)), answer].mean().item()


def test_log_probs_scores_and_losses_by_hand(make_batch):
    model = Bigram()
    batch = make_batch([([3, 5], [[7, 8, 9], [4]]), ([6], [[2], [1, 5, 3]])], labels=[0, 0])
    log_probs, mask = answer_log_probs(model, batch)

    p = model.log_prob
    expected = [[[p(5, 7), p(7, 8), p(8, 9)], [0, 0, p(5, 4)]], [[0, 0, p(6, 2)], [p(6, 1), p(1, 5), p(5, 3)]]]
    torch.testing.assert_close(log_probs, torch.tensor(expected))
    assert mask.tolist() == [[[True] * 3, [False, False, True]], [[False, False, True], [True] * 3]]

    scores = candidate_scores(log_probs, mask)
    means = [[sum(tokens) / sum(map(bool, tokens)) for tokens in example] for example in expected]
    torch.testing.assert_close(scores, torch.tensor(means))

    (right_0, wrong_0), (right_1, wrong_1) = torch.tensor(means).exp().tolist()
    by_hand = [right_0 / (right_0 + wrong_0), right_1 / (right_1 + wrong_1)]
    torch.testing.assert_close(
        classification_loss(scores, batch["label"]), -torch.tensor(by_hand).log().mean(), check_dtype=False
    )
    # the three tokens of one answer weigh three times the one of the other
    torch.testing.assert_close(
        language_modeling_loss(log_probs, mask, batch["label"]),
        torch.tensor(-(p(5, 7) + p(7, 8) + p(8, 9) + p(6, 2)) / 4),
    )


@pytest.mark.parametrize("attention", [None, "eager"])
def test_a_padded_batch_scores_as_each_candidate_alone(make_model, make_batch, architecture, attention):
    model = make_model(architecture, attention)
    scores = scores_of(model, make_batch(EXAMPLES, LABELS))
    for example, (prompt, candidates) in enumerate(EXAMPLES):
        expected = torch.tensor([alone(model, prompt, answer) for answer in candidates])
        torch.testing.assert_close(scores[example, : len(candidates)], expected, atol=1e-5, rtol=1e-5)


def test_a_batch_of_one_scores_as_in_company(make_model, make_batch, architecture):
    model = make_model(architecture)
    together = scores_of(model, make_batch(EXAMPLES, LABELS))
    for example, expected in zip(EXAMPLES, together, strict=True):
        single = scores_of(model, make_batch([example], [0]))[0]
        torch.testing.assert_close(single, expected[: len(single)], atol=1e-5, rtol=1e-5)


def test_prompts_alone_score_one_token_answers_as_whole_rows_do(make_model, make_batch, architecture):
    model = make_model(architecture)
    by_prompt = scores_of(model, make_batch(ONE_TOKEN, [0, 1, 0], prompt_only=True))
    by_row = scores_of(model, make_batch(ONE_TOKEN, [0, 1, 0]))
    torch.testing.assert_close(by_prompt, by_row, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt_only", [True, False])
def test_the_head_computes_only_the_logits_that_are_read(make_model, make_batch, architecture, prompt_only):
    model = make_model(architecture)
    positions = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: positions.append(logits.shape[1])
    )
    scores_of(model, make_batch(ONE_TOKEN if prompt_only else EXAMPLES, LABELS, prompt_only=prompt_only))
    assert positions == [1 if prompt_only else 4]  # longest answer and the position before it


def test_permuting_candidates_permutes_scores_and_keeps_the_loss(make_model, make_batch):
    model = make_model()
    order = [1, 0]
    examples = [(prompt, candidates[:2]) for prompt, candidates in EXAMPLES]
    permuted = [(prompt, [candidates[c] for c in order]) for prompt, candidates in examples]
    before = scores_of(model, make_batch(examples, [0, 1, 1]))
    after = scores_of(model, make_batch(permuted, [1, 0, 0]))
    torch.testing.assert_close(after, before[:, order])
    torch.testing.assert_close(
        classification_loss(after, torch.tensor([1, 0, 0])),
        classification_loss(before, torch.tensor([0, 1, 1])),
    )


def test_calibrated_scores_by_hand(make_batch):
    """Sums over tokens, with the prompt and without its content."""
    model = Bigram()
    batch = make_batch([([3, 5], [[7, 8, 9], [4], [4, 5]]), ([6], [[2], [1, 5, 3]])], labels=[0, 0])
    free = make_batch([([10], [[7, 8, 9], [4], [4, 5]]), ([11], [[2], [1, 5, 3]])], labels=[0, 0])
    scores = calibrated_scores(*answer_log_probs(model, batch), answer_log_probs(model, free)[0])
    p = model.log_prob
    # what follows a first token is as likely after either prompt
    expected = [[p(5, 7) - p(10, 7), p(5, 4) - p(10, 4), p(5, 4) - p(10, 4)]]
    expected.append([p(6, 2) - p(11, 2), p(6, 1) - p(11, 1), -float("inf")])
    torch.testing.assert_close(scores, torch.tensor(expected))


@pytest.mark.parametrize("prompt_only", [True, False])
def test_absent_candidates_get_no_score_and_change_nothing(make_model, make_batch, prompt_only):
    model = make_model()
    pair = ([14, 3], [[25], [9]])
    without = make_batch([pair], [1], prompt_only=prompt_only)
    batch = make_batch([pair, ([2, 31, 6], [[20], [33], [4]])], [1, 0], prompt_only=prompt_only)
    scores = scores_of(model, batch)
    assert scores[0, 2] == float("-inf")
    torch.testing.assert_close(
        classification_loss(scores[:1], batch["label"][:1]),
        classification_loss(scores_of(model, without), without["label"]),
    )

    loss = classification_loss(candidate_scores(*answer_log_probs(model, batch)), batch["label"])
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("prompt_only", [True, False])
def test_gradients_reach_the_weights_as_in_a_plain_forward(make_batch, prompt_only):
    model = Bigram()
    log_probs, _ = answer_log_probs(model, make_batch([([3, 5], [[7], [4]])], [0], prompt_only=prompt_only))
    (gradient,) = torch.autograd.grad(log_probs[0, 0, 0], model.table)
    (expected,) = torch.autograd.grad(torch.log_softmax(model.table, dim=-1)[5, 7], model.table)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("prompt_only", [True, False])
def test_scores_of_a_bfloat16_model_are_float32(make_model, make_batch, prompt_only):
    model = make_model().bfloat16()
    examples = ONE_TOKEN if prompt_only else EXAMPLES
    batch = make_batch(examples, LABELS, prompt_only=prompt_only)
    log_probs, mask = answer_log_probs(model, batch)
    assert log_probs.dtype == candidate_scores(log_probs, mask).dtype == torch.float32
    # rounded to bfloat16 anywhere after the logits, they would be multiples of 2**-7
    assert (log_probs[mask] != log_probs[mask].bfloat16()).all()


@pytest.mark.parametrize(
    "answers",
    [[[[6], [11]], [[25], [9]]], [[[6, 2], [11, 3]], [[25, 7], [9, 4]]], [[[6, 2], [11], [7, 8, 9]], [[25], [18, 9]]]],
    ids=["one token", "two tokens", "varying tokens and candidates"],
)
def test_nothing_waits_for_the_device_to_tell_a_size(answers):
    prompts = [[5, 9, 3, 17], [14, 3]]
    examples = [Example(i, p, a, label=0, text="") for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]
    batch = move_data_to_device(collate(examples, pad_id=1, objective="classification"), torch.device("cpu"))
    model = Bigram()
    with Waits() as watch:
        found, mask = answer_log_probs(model, batch)
        candidate_scores(found, mask)
        parts = [answer_log_probs(model, part) for part in micro_batches(batch, 1)]
    assert watch.found == []
    assert torch.equal(found, torch.cat([log_probs for log_probs, _ in parts]))
