"""A sentence for each sentence: cross-entropy under teacher forcing; BLEU of greedy translations on the test data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sacrebleu
import torch
from torch import Tensor, nn

from ngd_dist.config import Categorical
from ngd_workers.contract.errors import SpecError, UserCodeError
from ngd_workers.contract.events import Metric
from ngd_workers.contract.spec import Translation
from ngd_workers.data import TokenPairs
from ngd_workers.tasks.base import LOSS, Batch, Result, Task, logits_of, unfit
from ngd_workers.tasks.language_modelling import PERPLEXITY, of_tokens, perplexity

__all__ = ["TranslationTask", "build", "greedy"]


class TranslationTask(Task):
    """Batches (x, y), and (x, y, references) of test data, as `TokenPairs` describes them.

    The model is called with sources [N, S] and the targets' tokens up to each position, [N, P]; it returns logits
    [N, P, vocabulary] of the token after each. BLEU is that of sacrebleu over the whole test data: its counts add up.
    """

    metrics = (Metric(name="bleu", label="BLEU", better="higher"), PERPLEXITY, LOSS)
    likelihood = Categorical()
    counts_vary = True

    def __init__(self, choice: Translation, shape: TokenPairs) -> None:
        self._choice, self._shape = choice, shape
        # Tokens after bos; eos is one of them.
        self._most = 1 + min(choice.max_length or shape.length, shape.length - 2)

    def count(self, batch: Batch) -> Tensor:
        count: Tensor = (batch[1][:, 1:] != self._shape.padding).sum()
        return count

    def train_batch(self, model: nn.Module, batch: Batch) -> Result:
        x, y = batch[:2]
        logits = logits_of(model(x, y[:, :-1]))
        labels = y[:, 1:]
        if tuple(logits.shape) != (wanted := (*labels.shape, self._shape.vocabulary)):
            raise UserCodeError(f"the model must return logits of shape {wanted}, got {tuple(logits.shape)}")
        return of_tokens(logits, labels, self._shape.padding)

    def test_batch(self, model: nn.Module, batch: Batch) -> Result:
        result = self.train_batch(model, batch)
        x, _, references = batch
        translations = greedy(model, x, self._shape, self._most)
        result.sums = self._bleu_counts([self._shape.decode(row) for row in translations], references)
        return result

    def summarize(self, sums: Mapping[str, Tensor], count: float) -> dict[str, float]:
        metrics = {"perplexity": perplexity(sums, count)}
        if "bleu_counts" not in sums:
            return metrics
        correct, total = sums["bleu_counts"].round().int().tolist()
        lengths = sums["bleu_lengths"].round().int().tolist()
        score = sacrebleu.BLEU.compute_bleu(correct, total, sys_len=lengths[0], ref_len=lengths[1])
        return {"bleu": score.score} | metrics

    def _bleu_counts(self, translations: Sequence[str], references: Sequence[str]) -> dict[str, Tensor]:
        """Returns the n-grams found and made, [2, 4], and the words of the translations and of the references, [2]."""
        score = sacrebleu.corpus_bleu(
            translations,
            [references],
            tokenize=self._choice.bleu_tokenizer,
            lowercase=self._choice.bleu_lowercase,
            force=True,  # no warning that the texts look tokenized
        )
        return {
            "bleu_counts": torch.tensor([score.counts, score.totals]),
            "bleu_lengths": torch.tensor([score.sys_len, score.ref_len]),
        }


@torch.no_grad()
def greedy(model: nn.Module, source: Tensor, shape: TokenPairs, most: int) -> list[list[int]]:
    """Returns the likeliest token after each other for every source [N, S]: up to eos, without it, at most `most`.

    A sentence that has ended is computed no further.
    """
    translations: list[list[int]] = [[] for _ in range(len(source))]
    open_rows = torch.arange(len(source), device=source.device)
    targets = torch.full((len(source), 1), shape.bos, device=source.device)
    logits_after, select = _decoder(model, source)
    for _ in range(most):
        logits = logits_after(targets)[:, -1]
        # Neither belongs into a sentence: the loss never asks for them.
        logits[:, [shape.padding, shape.bos]] = -torch.inf
        following = logits.argmax(-1)
        goes_on = following != shape.eos
        for row, token in zip(open_rows[goes_on].tolist(), following[goes_on].tolist(), strict=True):
            translations[row].append(token)
        if not goes_on.any():
            break
        open_rows = open_rows[goes_on]
        targets = torch.cat([targets, following[:, None]], dim=1)[goes_on]
        select(goes_on)
    return translations


def _decoder(model: nn.Module, source: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], None]]:
    """Returns the logits as a function of the targets so far, and a function that keeps some of the sources.

    Of a model that has `encode` and `decode`, each source is encoded once.
    """
    encodes = hasattr(model, "encode") and hasattr(model, "decode")
    read: list[Any] = [model.encode(source) if encodes else (source,)]  # type: ignore[operator]

    def logits_after(targets: Tensor) -> Tensor:
        return logits_of(model.decode(read[0], targets) if encodes else model(*read[0], targets))  # type: ignore[operator]

    def select(kept: Tensor) -> None:
        read[0] = tuple(part[kept] for part in read[0])

    return logits_after, select


def build(choice: Translation, shape: Any) -> Task:
    """Returns the task for data of this shape. Raises: SpecError."""
    if not isinstance(shape, TokenPairs):
        raise unfit("translation", "pairs of texts", shape, TokenPairs)
    if choice.max_length is not None and choice.max_length > shape.length - 2:
        raise SpecError(
            f"task.max_length must be at most data.max_length ({shape.length - 2}), got {choice.max_length}; lower it"
        )
    return TranslationTask(choice, shape)
