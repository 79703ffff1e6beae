"""The parts of a server's span that clients ask for, each with what computes steps of it."""

from __future__ import annotations

from typing import Final

from petals_core.errors import WrongModelError
from petals_core.models.span import Span
from petals_server.engine import Engine
from petals_server.execution.steps import StepRunner
from petals_server.loading import ServedModel

_MAX_SPANS: Final = 16
"""Parts of the span that are kept ready; each costs some Python objects, the weights are shared."""


class ServedSpans:
    """Parts of the span of one server. Belongs to one event loop."""

    def __init__(self, model: ServedModel, engine: Engine) -> None:
        self._model = model
        self._engine = engine
        self._spans: dict[tuple[int, int], Span] = {(model.span.start, model.span.end): model.span}
        self._runners: dict[Span, StepRunner] = {} if model.runner is None else {model.span: model.runner}
        """Of the spans in ``_spans``."""

    async def find(self, fingerprint: str, start: int, end: int) -> Span:
        """The part that a client wants; raises ``WrongModelError`` if we do not hold it."""
        model = self._model
        if fingerprint != model.fingerprint:
            raise WrongModelError(f"this server holds another checkpoint: {model.name} {model.fingerprint[:12]}")
        if not model.span.start <= start < end <= model.span.end:
            raise WrongModelError(
                f"this server holds blocks {model.span.start}:{model.span.end}, which do not include {start}:{end}"
            )
        span = self._spans.get((start, end))
        if span is None:
            span = await self._engine.call(lambda: model.span.slice(start, end))
            while len(self._spans) >= _MAX_SPANS:
                oldest = self._spans.pop(list(self._spans)[1])  # but the first, which is the whole span
                self._runners.pop(oldest, None)
            self._spans[start, end] = span
        return span

    def runner(self, span: Span) -> StepRunner:
        """What computes steps of a part that was found."""
        runner = self._runners.get(span)
        if runner is None:
            assert self._model.cache is not None
            runner = self._runners[span] = StepRunner(
                span,
                self._model.cache,
                first_layer=span.start - self._model.span.start,
                form=self._model.form,
                threads=self._model.threads,
                kernel=self._model.kernel,
                with_replay=self._model.with_replay,
            )
        return runner
