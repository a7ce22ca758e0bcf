"""Padding counts for nothing, the cut of a batch does not matter, and metrics are what their definitions say."""

import math
from typing import Any

import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import Empirical, Exact, FixedInterval
from ngd_workers.contract.errors import SpecError, UserCodeError
from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.contract.spec import GPT, EncoderDecoder, JobSpec, LanguageModelling, Translation
from ngd_workers.data import Dataset, Images, TokenPairs, TokenSequences
from ngd_workers.data.text_pairs import PaddedTo
from ngd_workers.launch.attempt import run_rank
from ngd_workers.models import build_model
from ngd_workers.tasks import build_task
from ngd_workers.tasks.base import Task
from ngd_workers.tasks.translation import greedy
from ngd_workers.train.loading import MicroBatch
from ngd_workers.train.totals import Totals
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.parameters import rest_is_slow
from tests.support.ranks import run_ranks
from tests.support.tensors import flat
from tests.support.training import weights_at

TEXTS = TokenSequences(vocabulary=11, length=12, varies=True)
PAIRS = TokenPairs(12, 11, 14, source_padding=9, padding=8, bos=9, eos=10, decode=lambda row: " ".join(map(str, row)))
EXACT = {"rtol": 1e-9, "atol": 1e-12}


class Ragged:
    """Texts of 2 to 11 tokens, padded to 12 with label -100."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        x, y = torch.zeros(12, dtype=torch.int64), torch.full((12,), -100)
        count = 2 + index * 7 % 10
        row = torch.randint(11, (count + 1,), generator=generator)
        x[:count], y[:count] = row[:-1], row[1:]
        return x, y


class RaggedPairs:
    """Pairs of which the target is the source backwards, of 1 to 7 tokens."""

    def __init__(self, *, has_references: bool = False) -> None:
        self._has_references = has_references

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        row = torch.randint(8, (1 + index * 5 % 7,), generator=torch.Generator().manual_seed(index))
        source = torch.cat([torch.tensor([10]), row, torch.tensor([11])])
        target = torch.cat([torch.tensor([PAIRS.bos]), row.flip(0), torch.tensor([PAIRS.eos])])
        return (source, target, PAIRS.decode(row.flip(0).tolist())) if self._has_references else (source, target)


def texts() -> Dataset:
    return Dataset(Ragged(), Ragged(), TEXTS)


def pairs() -> Dataset:
    return Dataset(RaggedPairs(), RaggedPairs(has_references=True), PAIRS, collate=PaddedTo(9, 8))


def double(shape: Any) -> nn.Module:
    """A model in float64, so that the order of sums does not show."""
    return model_of(shape).double()


def model_of(shape: Any) -> nn.Module:
    if isinstance(shape, TokenSequences):
        return build_model(GPT(layers=2, width=8, heads=2), shape)
    return build_model(EncoderDecoder(encoder_layers=1, decoder_layers=1, width=8, heads=2), shape)


def task_of(shape: Any) -> Task:
    return build_task(LanguageModelling() if isinstance(shape, TokenSequences) else Translation(), shape)


def wider(batch: tuple[Tensor, Tensor], shape: Any, by: int) -> tuple[Tensor, Tensor]:
    """Returns the batch with more padding behind each row."""
    x, y = batch
    if isinstance(shape, TokenSequences):
        return F.pad(x, (0, by), value=3), F.pad(y, (0, by), value=-100)
    return F.pad(x, (0, by), value=shape.source_padding), F.pad(y, (0, by), value=shape.padding)


def even_batch(shape: Any) -> tuple[Tensor, Tensor]:
    """Returns a batch without any padding."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(8, (6, 8), generator=generator)
    return (rows[:, :-1], rows[:, 1:]) if isinstance(shape, TokenSequences) else (rows, rows.flip(1))


def after_steps(shape: Any, batches: list[tuple[Tensor, Tensor]], fisher: Any) -> Tensor:
    torch.manual_seed(0)
    model, task = double(shape), task_of(shape)
    optimizer = NGD(model, NGDConfig(lr=0.1, damping=0.01, fisher=fisher, staleness=FixedInterval(steps=1)))
    for batch in batches:
        with optimizer.samples(len(batch[0])):
            result = task.train_batch(model, batch)
        optimizer.fisher_backward(result.output, ignored=result.ignored)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return flat(model)


# Labels drawn from the model are others in a wider output; the exact Fisher is monte_carlo's expectation.
@pytest.mark.parametrize("fisher", [Empirical(), Empirical(positions="mean"), Exact()], ids=str)
@pytest.mark.parametrize("shape", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_padding_changes_no_step(shape, fisher):
    batch = even_batch(shape)

    bare = after_steps(shape, [batch] * 3, fisher)
    padded = after_steps(shape, [wider(batch, shape, by) for by in (1, 3, 2)], fisher)

    torch.testing.assert_close(padded, bare, **EXACT)


def test_padding_of_the_source_alone_changes_no_step():
    """Of such a batch the loss alone does not tell NGD that there is padding."""
    samples = [RaggedPairs()[index] for index in range(6)]
    even = [(source[:3], target[:3]) for source, target in samples]
    x, y = PaddedTo(9, 8)(
        [(F.pad(source, (0, 2 * (n == 0)), value=9), target) for n, (source, target) in enumerate(even)]
    )
    bare = PaddedTo(9, 8)(even)

    assert x.shape[1] == 5
    torch.testing.assert_close(
        after_steps(PAIRS, [(x, y)] * 2, Empirical()), after_steps(PAIRS, [bare] * 2, Empirical()), **EXACT
    )


NGD_CHOICE = {"kind": "ngd", "lr": 0.1, "damping": 0.01}
# Adaptive intervals follow the noise between the parts of the batch: another division refreshes at other steps.
FRESH = NGD_CHOICE | {"staleness": {"kind": "fixed", "steps": 1}}
OPTIMIZERS = {
    "sgd": {"kind": "sgd", "lr": 0.1},
    "ngd": FRESH,
    "ngd of a token's own gradient": FRESH | {"fisher": {"kind": "empirical", "positions": "mean"}},
}


def job(name: str, *, workers: int = 1, micro_size: int | None = None, optimizer: Any = None) -> JobSpec:
    where = "tests.workers.test_text_tasks"
    return small_spec(
        model={"kind": "function", "function": f"{where}:double"},
        data={"kind": "function", "function": f"{where}:{name}"},
        task={"kind": "language_modelling" if name == "texts" else "translation"},
        optimizer=optimizer or NGD_CHOICE,
        schedule={"steps": 4, "evaluate_every_steps": 4},
        batch={"global_size": 16, "micro_size": micro_size},
        resources={"workers": workers},
    )


def ran(rank: int, world_size: int, attempt: AttemptDir) -> dict[str, Any]:
    return run_rank(attempt).model_dump(exclude={"seconds"})


@pytest.mark.ranks
@pytest.mark.parametrize("optimizer", rest_is_slow(OPTIMIZERS, "ngd"))
@pytest.mark.parametrize("name", ["texts", "pairs"])
def test_steps_are_those_of_any_cut_of_the_batch_although_counts_differ(tmp_path, name, optimizer):
    choice = OPTIMIZERS[optimizer]
    outcome = run_rank(make_attempt(tmp_path / "whole", job(name, optimizer=choice)))
    assert outcome.result == "succeeded", outcome.message
    run_rank(make_attempt(tmp_path / "micro", job(name, micro_size=8, optimizer=choice)))
    two = make_attempt(tmp_path / "two", job(name, workers=2, micro_size=4, optimizer=choice))
    outcomes = run_ranks(2, ran, two)

    whole = weights_at(tmp_path / "whole", 4)
    for cut in ("micro", "two"):
        weights = weights_at(tmp_path / cut, 4)
        for key in whole:
            torch.testing.assert_close(weights[key], whole[key], rtol=1e-5, atol=1e-6)  # the loop weighs in float32
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["metrics"] == pytest.approx(outcome.metrics, rel=1e-6)


def test_perplexity_is_that_of_all_tokens_of_the_test_data(tmp_path):
    attempt = make_attempt(tmp_path, job("texts"))
    outcome = run_rank(attempt)

    model = double(TEXTS)
    model.load_state_dict(weights_at(tmp_path, 4))
    x, y = (torch.stack(side) for side in zip(*map(Ragged().__getitem__, range(48)), strict=True))
    with torch.no_grad():
        nats = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none")[y != -100]
    assert outcome.metrics == pytest.approx({"perplexity": math.exp(nats.mean()), "loss": float(nats.mean())})
    assert all(math.exp(r.metrics["loss"]) == pytest.approx(r.metrics["perplexity"]) for r in records(spooled(attempt)))


class Tabled(nn.Module):
    """Gives each source the translation that a table has for its first token."""

    def __init__(self, table: list[list[int]], vocabulary: int) -> None:
        super().__init__()
        self.table, self.vocabulary = table, vocabulary

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        following = [(self.table[int(row[0])] + [PAIRS.eos] * 20)[: target.shape[1]] for row in source]
        return F.one_hot(torch.tensor(following), self.vocabulary).double()


def test_greedy_ends_each_sentence_at_eos_or_at_the_bound():
    model = Tabled([[1, 2, 3], [], [5] * 9, [4]], PAIRS.vocabulary)

    assert greedy(model, torch.arange(4)[:, None], PAIRS, most=5) == [[1, 2, 3], [], [5] * 5, [4]]


def test_source_that_is_encoded_once_gives_the_same_translation():
    torch.manual_seed(1)
    model = double(PAIRS).eval()
    x, _ = PaddedTo(9, 8)([RaggedPairs()[index] for index in range(12)])

    class Whole(nn.Module):
        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            return model(source, target)

    assert greedy(model, x, PAIRS, 6) == greedy(Whole(), x, PAIRS, 6)


@pytest.mark.parametrize("cuts", [[40], [13, 13, 14], [1] * 40])
def test_bleu_of_added_counts_is_sacrebleus_of_the_whole_corpus(cuts):
    words = [["the", "cat", "sees", "a", "dog", ",", "and", "runs."][: 2 + n % 7] for n in range(40)]
    references = [" ".join(row) for row in words]
    translations = [" ".join([*row[: n % 5], *(["bird"] * (n % 2)), *row[n % 5 :]]) for n, row in enumerate(words)]
    task = task_of(PAIRS)
    sums: dict[str, Tensor] = {"loss": torch.tensor(1.0)}
    first = 0
    for size in cuts:
        part = slice(first, first := first + size)
        for name, value in task._bleu_counts(translations[part], references[part]).items():
            sums[name] = sums.get(name, torch.zeros(())).double() + value

    wanted = sacrebleu.corpus_bleu(translations, [references]).score
    assert 20 < wanted < 90
    assert task.summarize(sums, 1.0)["bleu"] == pytest.approx(wanted, rel=1e-12)


def test_translations_are_scored_against_their_references():
    table = [[1, 2, 3, 4, 5], [6, 7, 1, 2, 3], [4, 4, 4, 4, 4]]
    references = ["1 2 3 4 5", "6 7 1 2 3", "1 2 3 4 5"]
    y = torch.tensor([[9, 1, 10]] * 3)
    task = task_of(PAIRS)

    totals = Totals(torch.device("cpu"))
    batch = (torch.arange(3)[:, None], y, references)
    totals.add(task.test_batch(Tabled(table, PAIRS.vocabulary), batch), MicroBatch(batch, 3, 0, counts=True))

    wanted = sacrebleu.corpus_bleu([" ".join(map(str, row)) for row in table], [references]).score
    assert totals.metrics(task)["bleu"] == pytest.approx(wanted)


def test_position_sees_nothing_that_comes_after_it():
    model = double(TEXTS)
    x = torch.randint(11, (2, 8))
    changed = torch.cat([x[:, :5], (x[:, 5:] + 1) % 11], 1)

    torch.testing.assert_close(model(x)[:, :5], model(changed)[:, :5], **EXACT)


@pytest.mark.parametrize("shape", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_every_parameter_of_our_transformers_is_covered(shape):
    assert NGD(model_of(shape)).plain_parameters == {}


def test_causal_model_of_transformers_trains(tmp_path):
    pytest.importorskip("transformers")
    options = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 12, "tie_word_embeddings": False}
    model = {"kind": "transformers", "name": "GPT2LMHeadModel", "options": options}
    spec = job("texts").model_dump(mode="json") | {"model": model}

    outcome = run_rank(make_attempt(tmp_path, JobSpec.model_validate(spec)))

    assert outcome.result == "succeeded", outcome.message


def test_unfit_data_and_outputs_are_named():
    images = Images(1, 2, 2, 2)
    with pytest.raises(SpecError, match="task language_modelling needs a text of tokens, got data of Images"):
        build_task(LanguageModelling(), images)
    with pytest.raises(SpecError, match="task translation needs pairs of texts, got data of TokenSequences"):
        build_task(Translation(), TEXTS)
    with pytest.raises(SpecError, match=r"task.max_length must be at most data.max_length \(12\), got 13"):
        build_task(Translation(max_length=13), PAIRS)
    with pytest.raises(SpecError, match="model gpt needs a text of tokens"):
        build_model(GPT(), images)
    with pytest.raises(SpecError, match="model encoder_decoder needs pairs of texts"):
        build_model(EncoderDecoder(), images)
    with pytest.raises(UserCodeError, match=r"logits of shape \(6, 7, 11\), or of more tokens, got \(6, 7, 2\)"):
        task_of(TEXTS).train_batch(lambda x: torch.zeros(*x.shape, 2), even_batch(TEXTS))
