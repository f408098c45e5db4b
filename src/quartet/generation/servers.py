"""Generation by vLLM or SGLang servers, which run in environments of their own, over HTTP.

Requests have token ids, replies have token ids and log-probs, so text is encoded once. New weights
are written to a folder that the trainer and the servers share. A server pauses, returns unfinished
responses, loads the folder and resumes; unfinished responses are then continued with the new
weights. So each token was sampled from one known version. Where the policy is an adapter, a server
may be given the base model once and then only adapters, each under its own name.

Servers that share their GPUs with the trainer sleep whenever they do not sample (`sleeps`): they
are woken and given the newest weights before they sample, and put to sleep afterwards.

A server that fails gets no requests until it answers again, and then it gets the newest weights
first. Other servers take over its requests. `dialects.py` has the endpoints.
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

from quartet.experience import Prompt, Rollout
from quartet.generation.dialects import Dialect, Order, Piece
from quartet.generation.protocol import Weights
from quartet.generation.sampling import Sampling
from quartet.generation.server import (
    FAILURES,
    PAUSE,
    BadReply,
    Server,
    ServersAwake,
    ServersGone,
    accepted,
    json_table,
)
from quartet.generation.stops import StopStrings
from quartet.generation.transfer import WeightTransfer
from quartet.io.activity import counted
from quartet.io.http_client import HttpClient, Reply, RequestError, encode
from quartet.io.texts import excerpt
from quartet.io.threads import map_concurrently, result_of
from quartet.models.protocols import Tokenizer
from quartet.models.text import decoded_response

log = logging.getLogger(__name__)
MAX_BYTES, BYTES_PER_TOKEN = 1_000_000, 1_000
"""The largest reply: a fixed part, plus this much for each requested token."""
BASE = "base"
"""The name of the folder with the base model of the adapters, beside their folders."""


@dataclass
class _Answer:
    """A response that is not finished yet; new weights split it over several requests."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: str | None = None


class ServedGenerator:
    """A generator whose model runs in servers."""

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
        excluded: range = range(0),
        sleeps: bool = False,
        transfer: WeightTransfer | None = None,
    ) -> None:
        """`save` writes weights as a model folder below `shared`, a path that the servers can read.
        `timeout`: seconds for one request, for one server to load new weights, and to wait for a
        server to come back. `at_once`: requests in flight. `save_base` writes the base model; then
        `save` writes only an adapter. `vocab_size`: a reply with a token id that is not below it
        is rejected. `excluded`: ids outside of the policy's support, which servers are asked not to
        sample; a reply with one is rejected. With `sleeps` the servers sleep whenever they do not
        sample. `transfer` sends new weights instead of the folder."""
        self.excluded = excluded
        self.dialect, self.save_base, self.vocab_size = dialect, save_base, vocab_size
        self.sleeps, self.transfer = sleeps, transfer
        # An earlier run may have left them asleep.
        self.servers = [Server(url.rstrip("/"), asleep=sleeps) for url in urls]
        self.save = save
        self.shared = shared
        self.tokenizer = tokenizer
        self.seed = seed
        self.timeout = timeout
        self.stop_ids = sorted(stop_ids)
        self.version, self.calls, self._pushed = 0, 0, False
        self.pool = ThreadPoolExecutor(at_once, "ask")
        self.client = HttpClient()
        self._free = threading.Condition()

    def state(self) -> dict[str, int]:
        return {"version": self.version, "calls": self.calls}

    def load_state(self, state: Mapping[str, int]) -> None:
        self.version, self.calls = state["version"], state["calls"]

    def for_probes(self) -> "ServedGenerator":
        """Return a generator on the same servers and weights with random numbers of its own, which
        start anew with each copy: sampling from it does not change the run."""
        copied = copy.copy(self)
        copied.seed, copied.calls = self.seed + 1, 0
        return copied

    def close(self) -> None:
        """Cancel requests in flight and close the connections."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.client.close()
        if self.transfer is not None:
            self.transfer.close()

    # --- answers

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int = 1
    ) -> list[Rollout]:
        """Return the rollouts. A row's random numbers depend on the call and the row, not on the
        server that samples it. Raises ServersGone, and ServersAwake where one does not sleep as it
        should; after either the servers that answer are awake."""
        if not self.sleeps:
            return self._sample(prompts, sampling, samples_per_prompt)
        self._push_to([server for server in self.servers if server.failed is None])
        rollouts = self._sample(prompts, sampling, samples_per_prompt)
        refusals = map_concurrently(self._put_to_sleep, self.servers, len(self.servers))
        if refusal := next(filter(None, refusals), None):
            for server in self.servers:
                with contextlib.suppress(*FAILURES):
                    self._wake(server, time.monotonic() + self.timeout)
            raise refusal
        return rollouts

    def _sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int
    ) -> list[Rollout]:
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
                self._rollout(*row, result_of(answer), sampling)
                for row, answer in counted(
                    zip(rows, answers, strict=True), lambda _: 1, len(rows), "responses"
                )
            ]
        except BaseException:  # a signal, or no server: nothing waits for the other responses
            abandoned.set()
            for answer in answers:
                answer.cancel()
            self.client.close()
            raise

    def _answer(
        self, prompt: Prompt, sampling: Sampling, seed: int, abandoned: threading.Event
    ) -> _Answer:
        """Return one response, whichever servers and versions it needs. Raises ServersGone when no
        token has come for `timeout` seconds."""
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
        """Request the rest of a response and append what the reply has. Raises one of FAILURES."""
        version = server.version
        if version < 0:
            return  # the server was taken out of use a moment ago, to receive new weights
        name = None if self.save_base is None else _name(version)
        left = sampling.max_new_tokens - len(answer.ids)
        order = self.dialect.write(
            [*prompt.ids, *answer.ids], left, sampling, self.stop_ids, seed, name, self.excluded
        )
        reply = self._post(server, order, MAX_BYTES + BYTES_PER_TOKEN * left, self.timeout)
        if name is not None and 400 <= reply.status < 500 and server.version != version:
            return  # it asked for an adapter that was taken off meanwhile
        piece = self._piece(json_table(reply), left)
        answer.ids += piece.ids
        answer.logprobs += piece.logprobs
        answer.versions += piece.versions if name is None else [version] * len(piece.ids)
        if piece.finish != "abort":
            answer.finish = piece.finish
        elif len(answer.ids) == sampling.max_new_tokens:
            answer.finish = "length"
        # A server looks at the text of one request only, and may have sampled further.
        stops = StopStrings(self.tokenizer, sampling.stop)
        if (length := stops.length(prompt.ids, answer.ids)) is not None:
            for column in (answer.ids, answer.logprobs, answer.versions):
                del column[length:]
            answer.finish = "stop"

    def _piece(self, table: Mapping[str, Any], left: int) -> Piece:
        """Return the content of a reply, checked against the request."""
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
        if outside := [token for token in piece.ids if token in self.excluded]:
            raise BadReply(
                f"wrote token {outside[0]}, which the tokenizer does not have, although it was "
                "excluded by logit_bias"
            )
        if self.save_base is None and any(version > self.version for version in piece.versions):
            raise BadReply(
                f"says that a token is from weights {max(piece.versions)}; the newest are "
                f"{self.version}"
            )
        return piece

    def _next_server(self, until: float, reason: str, abandoned: threading.Event) -> Server:
        """Return the working server with the newest weights that has the fewest requests."""
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

    def _rollout(
        self, prompt: Prompt, group: int, sample: int, answer: _Answer, sampling: Sampling
    ) -> Rollout:
        stops = StopStrings(self.tokenizer, sampling.stop)
        text = decoded_response(self.tokenizer, prompt.ids, answer.ids)
        has_ended = answer.ids[-1] in self.stop_ids or stops.are_in(text)
        return Rollout(
            id=f"{prompt.id}/{sample}",
            prompt=prompt,
            group=group,
            response_ids=tuple(answer.ids),
            response=stops.text_before(text),
            logprobs=tuple(answer.logprobs),
            finish_reason="stop" if has_ended else "length",
            policy_version=answer.versions[0],
            versions=tuple(answer.versions),
        )

    # --- weights

    def load_weights(self, weights: Weights) -> None:
        """Write the weights to the shared folder and have all servers load them at the same time,
        or send them. Responses may be in flight meanwhile. A server that does not load them within
        `timeout` seconds counts as failed. Servers that sleep load them when they are woken."""
        if self.transfer is not None:
            self._send(self.transfer, weights)
            return
        save_base, tensors = self.save_base, weights.tensors
        if (
            save_base is not None and not self._pushed
        ):  # a folder from an earlier run may be another's
            self._write(self.shared / BASE, lambda place: save_base(place, tensors))
        self._pushed = True
        self._write(self._folder(weights.version), lambda place: self.save(place, tensors))
        kept = {self._folder(weights.version), self._folder(self.version)}
        self.version = weights.version
        if not self.sleeps:
            self._push_to([server for server in self.servers if server.failed is None])
            if all(server.failed for server in self.servers):
                self._revive()
        for old in (
            set(self.shared.resolve().glob("[0-9]*")) - kept
        ):  # the newest, and one that a server may be reading
            shutil.rmtree(old, ignore_errors=True)

    def _send(self, transfer: WeightTransfer, weights: Weights) -> None:
        """Send the weights to all servers. One that was lost gets none before the next call."""
        transfer.hold(weights.tensors)
        self.version = weights.version
        try:
            self._push_to([server for server in self.servers if server.failed is None])
            self._revive()
        finally:
            transfer.release()

    def _write(self, folder: Path, save: Callable[[Path], None]) -> None:
        """Save a folder under a hidden name and rename it when it is complete."""
        temporary = folder.with_name(f".{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        save(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    def _folder(self, version: int) -> Path:
        return self.shared.resolve() / f"{version:08d}"

    def _push_to(self, servers: Sequence[Server]) -> None:
        """Push to each of the servers, all at the same time."""
        try:
            map_concurrently(self._push, servers, len(servers))
        except BaseException:  # a signal: nothing waits for the servers
            self.client.close()
            raise

    def _push(self, server: Server) -> None:
        """Wake a server that sleeps; pause it, have it load the newest weights, and resume it. On
        an error, or after `timeout` seconds, it counts as failed."""
        with server.lock:
            has_newest = server.version == self.version and server.failed is None
            if has_newest and not server.asleep:
                return
            version, had = self.version, -1 if server.failed else server.version
            until = time.monotonic() + self.timeout
            with self._free:
                server.version = -1  # it gets no requests now
            try:
                if self.sleeps:
                    self._wake(server, until)
                if not has_newest:
                    self._tell(server, until, self.dialect.pause)
                    if self.transfer is not None:
                        self._receive(self.transfer, server, until, version)
                    elif self.save_base is None:
                        folder = self._folder(version)
                        self._tell(server, until, *self.dialect.read(folder, version))
                    else:
                        self._put_on(server, until, version, had)
                    self._tell(server, until, self.dialect.resume)
                server.version, server.failed = version, None
            except FAILURES as error:
                server.version = -1
                server.fail(
                    str(error)
                    if time.monotonic() < until
                    else f"did not load weights {version} within generator.timeout = "
                    f"{self.timeout:g} s"
                )
        with self._free:
            self._free.notify_all()

    def _receive(
        self, transfer: WeightTransfer, server: Server, until: float, version: int
    ) -> None:
        """Have a server receive the weights that are held."""

        def ask(method: str, path: str, body: Any) -> Mapping[str, Any]:
            left, content = max(until - time.monotonic(), 0.0), body and encode(body)
            url = server.url + path
            return json_table(self.client.request(method, url, content, left, MAX_BYTES))

        transfer.push(server.url, version, ask)

    def _put_on(self, server: Server, until: float, version: int, had: int) -> None:
        """Load the base model where the server may not have it, then the adapter. An adapter of
        that name that an earlier run left is unloaded first."""
        if had < 0:
            self._tell(server, until, *self.dialect.read(self.shared.resolve() / BASE, version))
        for old in {had, version} - {-1}:
            with contextlib.suppress(BadReply):
                self._tell(server, until, self.dialect.take_off(_name(old)))
        self._tell(server, until, self.dialect.put_on(_name(version), self._folder(version)))

    def _wake(self, server: Server, until: float) -> None:
        """Wake a server. Raises one of FAILURES, with a phrase that says so."""
        assert self.dialect.wake is not None
        try:
            self._tell(server, until, self.dialect.wake)
        except FAILURES as error:
            raise BadReply(f"sleeps and could not be woken ({error})") from error
        server.asleep = False

    def _put_to_sleep(self, server: Server) -> ServersAwake | None:
        """Put a server to sleep. One that cannot be reached counts as failed. Return an error for
        one that refuses, unless it has failed before."""
        assert self.dialect.sleep is not None
        had_failed, server.asleep = server.failed is not None, True
        seconds = 4 * PAUSE if had_failed else self.timeout
        try:
            self._tell(server, time.monotonic() + seconds, self.dialect.sleep)
        except RequestError as error:
            server.fail(str(error))
        except BadReply as error:
            if not had_failed:
                return ServersAwake(
                    f"generation server {server.url} cannot be put to sleep and keeps its GPU's "
                    f"memory ({error}). Start it with VLLM_SERVER_DEV_MODE=1 and "
                    "--enable-sleep-mode, or take generator.sleep out."
                )
        return None

    def _tell(self, server: Server, until: float, *orders: Order) -> None:
        """Send orders one after another, which together end before time.monotonic() is `until`."""
        for order in orders:
            left = max(until - time.monotonic(), 0.0)
            accepted(self._post(server, order, MAX_BYTES, left))

    def _post(self, server: Server, order: Order, max_bytes: int, seconds: float) -> Reply:
        body = None if order.body is None else encode(order.body)
        return self.client.request("POST", server.url + order.path, body, seconds, max_bytes)

    def _revive(self) -> None:
        """Try the failed servers whose pause is over. Without the pause, a server that answers
        wrongly would get requests before those that work."""
        for server in self.servers:
            if server.failed is None and server.version == self.version:
                continue
            if server.lock.locked() or time.monotonic() < server.again:
                continue
            with contextlib.suppress(*FAILURES):
                accepted(
                    self.client.request("GET", f"{server.url}/health", None, PAUSE * 4, MAX_BYTES)
                )
                if self._has_weights():
                    self._push(server)

    def _has_weights(self) -> bool:
        """Return whether a server can be given the newest weights now."""
        sent = self.transfer
        return self._folder(self.version).is_dir() if sent is None else sent.held is not None

    def _gone(self, reason: str) -> ServersGone:
        reasons = "; ".join(
            f"{server.url}: {server.failed or reason or 'has older weights'}"
            for server in self.servers
        )
        return ServersGone(
            f"no generation server answered for {self.timeout:g} s ({reasons}). Start one, and "
            "resume the run."
        )


def _name(version: int) -> str:
    """Return the name of an adapter. It differs for each version, because a server's caches are
    keyed by it."""
    return f"policy-{version}"
