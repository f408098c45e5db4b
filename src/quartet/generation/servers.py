"""Answers from servers: vLLM's or SGLang's, each in an environment of its own, spoken to over HTTP.

Token ids go out, token ids and log-probs come back; text is never encoded twice. New weights go through a folder that trainer
and servers share: the server stops, giving back the answers that it was writing, reads the folder and goes on; what was half
written is continued with the new weights. So every token was sampled by one version, which is known. Where the policy is an
adapter, a server may be given its base once and then the adapters alone, each by a name of its own.

A server that fails is left alone until it answers again, and is then given the newest weights first; its requests go to the
others. What the endpoints are called, `dialects.py` says.
"""

import contextlib
import copy
import random
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from quartet.experience import Prompt, Rollout
from quartet.generation.dialects import Dialect, Order
from quartet.generation.protocol import Weights
from quartet.generation.sampling import Sampling

IDLE = 1.0
"""Seconds after which a connection is not used again. Servers (uvicorn) close theirs after 5; a request that is on its way then
is lost, and its server would count as failed."""
PAUSE = 0.5
"""Seconds before a server that failed is asked again."""
BASE = "base"
"""The folder beside them, of what adapters stand on."""


class ServersGone(RuntimeError):
    """No server answers: the message names them and what they said."""


@dataclass
class Server:
    """One address, and what is known of it."""

    url: str
    version: int = -1
    """Of the weights it has; −1: not known."""
    working: int = 0
    """Requests that it is answering."""
    failed: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class _Answer:
    """One answer as it grows: over several requests, where weights came in between."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: str | None = None


class ServedGenerator:
    """A generator whose model is somewhere else."""

    def __init__(
        self,
        dialect: Dialect,
        urls: Sequence[str],
        save: Callable[[Path, Mapping[str, Any]], None],
        shared: Path,
        tokenizer: Any,
        stop_ids: frozenset[int],
        seed: int,
        timeout: float = 600.0,
        at_once: int = 256,
        save_base: Callable[[Path, Mapping[str, Any]], None] | None = None,
    ) -> None:
        """`save` writes weights as a model folder; `shared` is where, a path that servers read too. `timeout`: seconds for one
        answer, and for how long one waits until a server is back. `at_once`: requests in flight. `save_base`: writes a model
        folder; what `save` writes is then an adapter on it."""
        self.dialect, self.save_base = dialect, save_base
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.save, self.shared, self.tokenizer, self.seed, self.timeout = save, shared, tokenizer, seed, timeout
        self.stop_ids = sorted(stop_ids)
        self.version, self.calls, self._pushed = 0, 0, False
        self.pool = ThreadPoolExecutor(at_once, "ask")
        limits = httpx.Limits(max_connections=None, keepalive_expiry=IDLE)
        self.client = httpx.Client(timeout=timeout, limits=limits, follow_redirects=False)
        weakref.finalize(self, self.client.close)
        self._free = threading.Condition()

    def state(self) -> dict[str, int]:
        return {"version": self.version, "calls": self.calls}

    def load_state(self, state: Mapping[str, int]) -> None:
        self.version, self.calls = state["version"], state["calls"]

    def aside(self) -> "ServedGenerator":
        """The same servers with the weights that they have now, for questions that are no part of the run: none of its random
        numbers are drawn, and each time the same ones."""
        made = copy.copy(self)
        made.seed, made.calls = self.seed + 1, 0
        return made

    def close(self) -> None:
        """Let go of the connections."""
        self.pool.shutdown()
        self.client.close()

    # --- answers ---------------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int = 1) -> list[Rollout]:
        """Random numbers belong to the call and the row, not to the server."""
        self.calls += 1
        rows = [(prompt, group, sample) for group, prompt in enumerate(prompts) for sample in range(samples_per_prompt)]
        seeds = [random.Random(f"{self.seed}/{self.calls}/{row}").getrandbits(31) for row in range(len(rows))]
        asked = [self.pool.submit(self._written, row[0], sampling, seed) for row, seed in zip(rows, seeds, strict=True)]
        return [self._rollout(*row, answer.result()) for row, answer in zip(rows, asked, strict=True)]

    def _written(self, prompt: Prompt, sampling: Sampling, seed: int) -> _Answer:
        """One answer, by however many servers and versions it takes."""
        answer, until, failures, reason = _Answer(), time.monotonic() + self.timeout, 0, ""
        while answer.finish is None:
            server = self._next_server(max(until, time.monotonic() + PAUSE), reason)
            try:
                self._continue(server, prompt, sampling, seed + len(answer.ids), answer)
            except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError) as error:
                reason = server.failed = _words(error)
                failures += 1
                if failures > len(self.servers) and time.monotonic() > until:
                    raise self._gone(reason) from error
            finally:
                with self._free:
                    server.working -= 1
                    self._free.notify_all()
        return answer

    def _continue(self, server: Server, prompt: Prompt, sampling: Sampling, seed: int, answer: _Answer) -> None:
        """Ask for the rest of an answer, and take what comes."""
        version = server.version
        if version < 0:
            return  # it was just taken aside, to be given others
        name = None if self.save_base is None else _name(version)
        left = sampling.max_new_tokens - len(answer.ids)
        order = self.dialect.write([*prompt.ids, *answer.ids], left, sampling, self.stop_ids, seed, name)
        replied = self.client.post(server.url + order.path, json=order.body)
        if name is not None and replied.is_client_error and server.version != version:
            return  # it asked for an adapter that was taken off meanwhile
        replied.raise_for_status()
        piece = self.dialect.written(replied.json())
        if piece.finish == "length" and len(piece.ids) < left:
            raise ValueError(
                f"it wrote {len(piece.ids)} of {left} tokens: does it read fewer than a prompt and an answer have?"
            )
        answer.ids += piece.ids
        answer.logprobs += piece.logprobs
        answer.versions += piece.versions if name is None else [version] * len(piece.ids)
        if piece.finish != "abort":
            answer.finish = piece.finish
        elif len(answer.ids) == sampling.max_new_tokens:
            answer.finish = "length"

    def _next_server(self, until: float, reason: str) -> Server:
        """The one with the fewest requests, of those that work and have the newest weights."""
        while True:
            self._revive()
            with self._free:
                usable = [s for s in self.servers if s.failed is None and s.version == self.version]
                if usable:
                    server = min(usable, key=lambda s: s.working)
                    server.working += 1
                    return server
                self._free.wait(PAUSE)
            if time.monotonic() > until:
                raise self._gone(reason)

    def _rollout(self, prompt: Prompt, group: int, sample: int, answer: _Answer) -> Rollout:
        before = self.tokenizer.decode(prompt.ids, skip_special_tokens=True)
        text = self.tokenizer.decode([*prompt.ids, *answer.ids], skip_special_tokens=True)
        response = (
            text[len(before) :] if text.startswith(before) else self.tokenizer.decode(answer.ids, skip_special_tokens=True)
        )
        return Rollout(
            id=f"{prompt.id}/{sample}",
            prompt=prompt,
            group=group,
            response_ids=tuple(answer.ids),
            response=response,
            logprobs=tuple(answer.logprobs),
            finish_reason="stop" if answer.ids[-1] in self.stop_ids else "length",
            policy_version=answer.versions[0],
            versions=tuple(answer.versions),
        )

    # --- weights ---------------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Weights) -> None:
        """Write them where the servers read, and have each read them. May come while answers are being written."""
        save_base, tensors = self.save_base, weights.tensors
        if save_base is not None and not self._pushed:  # a folder from an earlier run may be another's
            self._write(self.shared / BASE, lambda place: save_base(place, tensors))
        self._pushed = True
        self._write(self._folder(weights.version), lambda place: self.save(place, tensors))
        kept = {self._folder(weights.version), self._folder(self.version)}
        self.version = weights.version
        for server in self.servers:
            if server.failed is None:
                self._push(server)
        if all(server.failed for server in self.servers):
            self._revive()
        for old in set(self.shared.resolve().glob("[0-9]*")) - kept:  # the newest, and one that somebody may be reading
            shutil.rmtree(old, ignore_errors=True)

    def _write(self, folder: Path, save: Callable[[Path], None]) -> None:
        """Under its name once it is whole."""
        beside = folder.with_name(f".{folder.name}")
        shutil.rmtree(beside, ignore_errors=True)
        save(beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)

    def _folder(self, version: int) -> Path:
        return self.shared.resolve() / f"{version:08d}"

    def _push(self, server: Server) -> None:
        """Pause, read, go on. A server that cannot is one that failed."""
        with server.lock:
            if server.version == self.version and server.failed is None:
                return
            version, had = self.version, -1 if server.failed else server.version
            with self._free:
                server.version = -1  # nobody asks it now
            try:
                self._tell(server, self.dialect.pause)
                if self.save_base is None:
                    self._tell(server, *self.dialect.read(self._folder(version), version))
                else:
                    self._put_on(server, version, had)
                server.version = version
                self._tell(server, self.dialect.resume)
                server.failed = None
            except httpx.HTTPError as error:
                server.version, server.failed = -1, _words(error)
        with self._free:
            self._free.notify_all()

    def _put_on(self, server: Server, version: int, had: int) -> None:
        """The base, where it is not known to have it; then the adapter alone. An older run may have left one by that name."""
        if had < 0:
            self._tell(server, *self.dialect.read(self.shared.resolve() / BASE, version))
        for old in {had, version} - {-1}:
            with contextlib.suppress(httpx.HTTPStatusError):
                self._tell(server, self.dialect.take_off(_name(old)))
        self._tell(server, self.dialect.put_on(_name(version), self._folder(version)))

    def _tell(self, server: Server, *orders: Order) -> None:
        for order in orders:
            self.client.post(server.url + order.path, json=order.body).raise_for_status()

    def _revive(self) -> None:
        """Those that failed, if they answer again: with the newest weights."""
        for server in self.servers:
            if server.failed is None and server.version == self.version:
                continue
            if server.lock.locked():  # somebody is at it
                continue
            with contextlib.suppress(httpx.HTTPError):
                self.client.get(f"{server.url}/health", timeout=PAUSE * 4).raise_for_status()
                if self._folder(self.version).is_dir():
                    self._push(server)

    def _gone(self, reason: str) -> ServersGone:
        said = "; ".join(f"{server.url}: {server.failed or reason or 'has older weights'}" for server in self.servers)
        return ServersGone(f"no generation server answered for {self.timeout:g} s ({said}). Start one, and resume the run.")


def _name(version: int) -> str:
    """Of an adapter; caches of a server know it by that."""
    return f"policy-{version}"


def _words(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"answered {error.response.status_code}: {error.response.text[:300]}".rstrip(" :.")
    return str(error).strip().rstrip(".") or type(error).__name__
