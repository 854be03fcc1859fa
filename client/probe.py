"""A model is tried before it is trusted: it must load, and give the outputs that it gave where it was released."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from propolis.secure.errors import PeerError, PropolisError, Refusal
from propolis.secure.manifest import Manifest

# Loads the model in the files and runs it on the golden batch among them; returns the largest absolute difference
# between the outputs and the recorded ones. It runs in a thread of its own, which is left behind when its time is over.
Probe = Callable[[Manifest, Mapping[str, bytes]], float]


def try_model(probe: Probe, manifest: Manifest, files: Mapping[str, bytes]) -> None:
    """Try a model as its manifest says.

    Raises:
        PeerError: it does not load, takes too long, or gives other outputs.
    """
    attempt = _Attempt(probe, manifest, files)
    attempt.start()
    attempt.join(manifest.trial.seconds)
    if attempt.is_alive():
        raise PeerError(Refusal.PROBE, f"the model has not answered the golden batch in {manifest.trial.seconds:g} s")
    if attempt.error is not None or attempt.difference is None:
        why = str(attempt.error) if isinstance(attempt.error, PropolisError) else repr(attempt.error)
        raise PeerError(Refusal.PROBE, f"the model does not run: {why}")
    largest = manifest.trial.largest_difference
    if not attempt.difference <= largest:  # also where it is NaN
        raise PeerError(
            Refusal.PROBE, f"outputs on the golden batch differ by {attempt.difference:g}, {largest:g} at most"
        )


class _Attempt(threading.Thread):
    """One call of a probe; a process can end while it hangs."""

    def __init__(self, probe: Probe, manifest: Manifest, files: Mapping[str, bytes]) -> None:
        super().__init__(name="propolis-probe", daemon=True)
        self._probe, self._manifest, self._files = probe, manifest, files
        self.difference: float | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Keep what the probe returns or raises."""
        try:
            self.difference = self._probe(self._manifest, self._files)
        except Exception as error:
            self.error = error
