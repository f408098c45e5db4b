"""Answers from servers: vLLM's or SGLang's, each in an environment of its own, spoken to over HTTP.

Token ids go out, token ids and log-probs come back; text is never encoded twice. New weights go
through a folder that trainer and servers share: the server stops, giving back the answers that it
was writing, reads the folder and goes on; what was half written is continued with the new weights.
So every token was sampled by one version, which is known. Where the policy is an adapter, a server
may be given its base once and then the adapters alone, each by a name of its own.

A server that fails is left alone until it answers again, and is then given the newest weights
first; its requests go to the others. What the endpoints are called, `dialects.py` says.
"""

import contextlib
import copy
import logging
import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quartet.errors import QuartetError
from quartet.experience import Prompt, Rollout
from quartet.generation.dialects import Dialect, Order, Piece
from quartet.generation.protocol import Weights
from quartet.generation.sampling import Sampling
from quartet.io.http_client import HttpClient, Reply, RequestError, encode, error_in
from quartet.io.texts import excerpt
from quartet.io.threads import result_of
from quartet.models.protocols import Tokenizer

log = logging.getLogger(__name__)
PAUSE = 0.5
"""Seconds before a server that failed is asked again."""
MAX_BYTES, BYTES_PER_TOKEN = 1_000_000, 1_000
"""How long a reply may be: a fixed part, and so much for each token that was asked for."""
BASE = "base"
"""The folder beside them, of what adapters stand on."""


class ServersGone(QuartetError, RuntimeError):
    """No server answers: the message names them and what they said."""


class BadReply(QuartetError):
    """What a server answered is an error, or not an answer. The message is a phrase that follows
    the server's name."""

    def __init__(self, phrase: str, status: int = 200) -> None:
        super().__init__(phrase)
        self.status = status


FAILURES = (RequestError, BadReply)


@dataclass
class Server:
    """One address, and what is known of it."""

    url: str
    version: int = -1
    """Of the weights it has; −1: not known."""
    working: int = 0
    """Requests that it is answering."""
    failed: str | None = None
    """Why it is left alone."""
    again: float = 0.0
    """When it may be asked again, as time.monotonic() counts."""
    complaint: str | None = None
    """What the log last said of it."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, reason: str) -> None:
        """Leave it alone for a while. The log has each new reason."""
        self.failed, self.again = reason, time.monotonic() + PAUSE
        if reason != self.complaint:
            self.complaint = reason
            log.warning(
                "generation server %s %s. It is left alone until it answers again.",
                self.url,
                reason,
            )


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
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        seed: int,
        timeout: float = 600.0,
        at_once: int = 256,
        save_base: Callable[[Path, Mapping[str, Any]], None] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """`save` writes weights as a model folder; `shared` is where, a path that servers read too.
        `timeout`: seconds for one answer, and for how long one waits until a server is back.
        `at_once`: requests in flight. `save_base`: writes a model folder; what `save` writes is
        then an adapter on it. `vocab_size`: token ids are below it."""
        self.dialect, self.save_base, self.vocab_size = dialect, save_base, vocab_size
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.save, self.shared, self.tokenizer, self.seed, self.timeout = (
            save,
            shared,
            tokenizer,
            seed,
            timeout,
        )
        self.stop_ids = sorted(stop_ids)
        self.version, self.calls, self._pushed = 0, 0, False
        self.pool = ThreadPoolExecutor(at_once, "ask")
        self.client = HttpClient()
        self._free = threading.Condition()

    def state(self) -> dict[str, int]:
        return {"version": self.version, "calls": self.calls}

    def load_state(self, state: Mapping[str, int]) -> None:
        self.version, self.calls = state["version"], state["calls"]

    def aside(self) -> "ServedGenerator":
        """The same servers with the weights that they have now, for questions that are no part of
        the run: none of its random numbers are drawn, and each time the same ones."""
        made = copy.copy(self)
        made.seed, made.calls = self.seed + 1, 0
        return made

    def close(self) -> None:
        """Give up requests that are on their way, and close the connections."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.client.close()

    # --- answers

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int = 1
    ) -> list[Rollout]:
        """Random numbers belong to the call and the row, not to the server."""
        self.calls += 1
        rows = [
            (prompt, group, sample)
            for group, prompt in enumerate(prompts)
            for sample in range(samples_per_prompt)
        ]
        seeds = [
            random.Random(f"{self.seed}/{self.calls}/{row}").getrandbits(31)
            for row in range(len(rows))
        ]
        abandoned = threading.Event()
        answers = [
            self.pool.submit(self._answer, row[0], sampling, seed, abandoned)
            for row, seed in zip(rows, seeds, strict=True)
        ]
        try:
            return [
                self._rollout(*row, result_of(answer))
                for row, answer in zip(rows, answers, strict=True)
            ]
        except BaseException:  # a signal, or no server: nobody waits for the other answers
            abandoned.set()
            for answer in answers:
                answer.cancel()
            self.client.close()
            raise

    def _answer(
        self, prompt: Prompt, sampling: Sampling, seed: int, abandoned: threading.Event
    ) -> _Answer:
        """One answer, by however many servers and versions it takes. Raises ServersGone where no
        token came for `timeout` seconds."""
        answer, until, failures, reason = _Answer(), time.monotonic() + self.timeout, 0, ""
        while answer.finish is None:
            server = self._next_server(max(until, time.monotonic() + PAUSE), reason, abandoned)
            length = len(answer.ids)
            try:
                self._continue(server, prompt, sampling, seed + len(answer.ids), answer)
            except FAILURES as error:
                reason = str(error)
                server.fail(reason)
                failures += 1
                if failures > len(self.servers) and time.monotonic() > until:
                    raise self._gone(reason) from error
            finally:
                with self._free:
                    server.working -= 1
                    self._free.notify_all()
            if len(answer.ids) > length:
                until = time.monotonic() + self.timeout
            elif (
                answer.finish is None and server.failed is None
            ):  # it was aborted before its first token
                if time.monotonic() > until:
                    raise self._gone("aborted every request before its first token")
                time.sleep(PAUSE / 10)
        return answer

    def _continue(
        self, server: Server, prompt: Prompt, sampling: Sampling, seed: int, answer: _Answer
    ) -> None:
        """Ask for the rest of an answer, and take what comes. Raises one of FAILURES."""
        version = server.version
        if version < 0:
            return  # it was just taken aside, to be given others
        name = None if self.save_base is None else _name(version)
        left = sampling.max_new_tokens - len(answer.ids)
        order = self.dialect.write(
            [*prompt.ids, *answer.ids], left, sampling, self.stop_ids, seed, name
        )
        reply = self._post(server, order, MAX_BYTES + BYTES_PER_TOKEN * left)
        if name is not None and 400 <= reply.status < 500 and server.version != version:
            return  # it asked for an adapter that was taken off meanwhile
        piece = self._piece(_table(reply), left)
        answer.ids += piece.ids
        answer.logprobs += piece.logprobs
        answer.versions += piece.versions if name is None else [version] * len(piece.ids)
        if piece.finish != "abort":
            answer.finish = piece.finish
        elif len(answer.ids) == sampling.max_new_tokens:
            answer.finish = "length"

    def _piece(self, table: Mapping[str, Any], left: int) -> Piece:
        """What a reply says, checked against what was asked for."""
        try:
            piece = self.dialect.written(table)
        except ValueError as error:
            raise BadReply(f"gave no answer: {error}") from None
        except (LookupError, TypeError, AttributeError) as error:
            raise BadReply(
                f"gave an answer of another form ({type(error).__name__}: {excerpt(str(error))})"
            ) from None
        if len(piece.ids) > left:
            raise BadReply(f"wrote {len(piece.ids)} tokens where {left} were asked for")
        if piece.finish == "length" and len(piece.ids) < left:
            raise BadReply(
                f"it wrote {len(piece.ids)} of {left} tokens: does it read fewer than a prompt and "
                f"an answer have?"
            )
        if self.vocab_size is not None and any(token >= self.vocab_size for token in piece.ids):
            raise BadReply(
                f"wrote token {max(piece.ids)}; the policy has tokens up to {self.vocab_size - 1}"
            )
        if self.save_base is None and any(version > self.version for version in piece.versions):
            raise BadReply(
                f"says that a token is from weights {max(piece.versions)}; the newest are "
                f"{self.version}"
            )
        return piece

    def _next_server(self, until: float, reason: str, abandoned: threading.Event) -> Server:
        """The one with the fewest requests, of those that work and have the newest weights."""
        while True:
            if abandoned.is_set():
                raise ServersGone("the answer is no longer wanted.")
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
            text[len(before) :]
            if text.startswith(before)
            else self.tokenizer.decode(answer.ids, skip_special_tokens=True)
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

    # --- weights

    def load_weights(self, weights: Weights) -> None:
        """Write them where the servers read, and have each read them. May come while answers are
        being written."""
        save_base, tensors = self.save_base, weights.tensors
        if (
            save_base is not None and not self._pushed
        ):  # a folder from an earlier run may be another's
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
        for old in (
            set(self.shared.resolve().glob("[0-9]*")) - kept
        ):  # the newest, and one that somebody may be reading
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
            except FAILURES as error:
                server.version = -1
                server.fail(str(error))
        with self._free:
            self._free.notify_all()

    def _put_on(self, server: Server, version: int, had: int) -> None:
        """The base, where it is not known to have it; then the adapter alone. An older run may have
        left one by that name."""
        if had < 0:
            self._tell(server, *self.dialect.read(self.shared.resolve() / BASE, version))
        for old in {had, version} - {-1}:
            with contextlib.suppress(BadReply):
                self._tell(server, self.dialect.take_off(_name(old)))
        self._tell(server, self.dialect.put_on(_name(version), self._folder(version)))

    def _tell(self, server: Server, *orders: Order) -> None:
        for order in orders:
            _accepted(self._post(server, order, MAX_BYTES))

    def _post(self, server: Server, order: Order, max_bytes: int) -> Reply:
        body = None if order.body is None else encode(order.body)
        return self.client.request("POST", server.url + order.path, body, self.timeout, max_bytes)

    def _revive(self) -> None:
        """Those that failed, if they answer again, and not at once: else one that answers wrongly
        would be asked before those that answer well."""
        for server in self.servers:
            if server.failed is None and server.version == self.version:
                continue
            if server.lock.locked() or time.monotonic() < server.again:
                continue
            with contextlib.suppress(*FAILURES):
                _accepted(
                    self.client.request("GET", f"{server.url}/health", None, PAUSE * 4, MAX_BYTES)
                )
                if self._folder(self.version).is_dir():
                    self._push(server)

    def _gone(self, reason: str) -> ServersGone:
        said = "; ".join(
            f"{server.url}: {server.failed or reason or 'has older weights'}"
            for server in self.servers
        )
        return ServersGone(
            f"no generation server answered for {self.timeout:g} s ({said}). Start one, and resume "
            f"the run."
        )


def _name(version: int) -> str:
    """Of an adapter; caches of a server know it by that."""
    return f"policy-{version}"


def _accepted(reply: Reply) -> None:
    """Raise BadReply where a server refuses an order, also where it does so with status 200."""
    if not 200 <= reply.status < 300:
        raise BadReply(
            f"answered {reply.status}: {excerpt(reply.body, 300)}".rstrip(" :."), reply.status
        )
    with contextlib.suppress(ValueError):
        table = reply.json()
        if (message := error_in(table)) is not None:
            raise BadReply(f"answered with an error: {message}")
        if isinstance(table, dict) and table.get("success") is False:
            raise BadReply(f"refused: {excerpt(reply.body, 300)}")


def _table(reply: Reply) -> Mapping[str, Any]:
    """The JSON object that a reply is."""
    _accepted(reply)
    if reply.status != 200:
        raise BadReply(
            f"answered {reply.status}: {excerpt(reply.body) or '(nothing)'}", reply.status
        )
    try:
        table = reply.json()
    except ValueError:
        raise BadReply(
            f"answered with something that is not JSON: {excerpt(reply.body) or '(nothing)'}"
        ) from None
    if not isinstance(table, dict):
        raise BadReply(f"answered with something that is no object: {excerpt(reply.body)}")
    return table
