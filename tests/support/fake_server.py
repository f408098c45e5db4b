"""What Quartet asks of vLLM and of SGLang, on a tiny model: `python -m tests.support.fake_server PORT FOLDER [SECONDS PER TOKEN [KIND]]`.

The endpoints, their fields and what they refuse are theirs; the sampling is a plain loop without a cache.
"""

import socket
import sys
import threading
import time
from pathlib import Path

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from quartet.models.adapters import POLICY, load_adapter
from quartet.models.language_model import load_model
from tests.support.fake_transfer import Receiver, Refused


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


LOADING = threading.Lock()
"""transformers loads one model at a time in a process; several fakes may live in one."""


def loaded(folder):
    with LOADING:
        return load_model(folder)


class Engine:
    def __init__(self, folder, pause=0.0):
        self.pause = pause
        self.paused, self.writing, self.lock = threading.Event(), 0, threading.Condition()
        self.asked, self.told, self.context = [], [], 10**6
        self.ports = set()
        self.receiver = Receiver()
        self.asleep, self.refuse = False, {}
        """Whether it sleeps; what paths do instead of what they should."""
        self.read(folder)

    def read(self, folder):
        """Another base: adapters stood on the old one."""
        self.folder, self.model, self.adapters, self.version = (
            folder,
            loaded(folder),
            {},
            "default",
        )

    def put_on(self, name, folder):
        model = loaded(self.folder)
        load_adapter(model, POLICY, Path(folder))
        self.adapters[name] = model

    @torch.inference_mode()
    def complete(self, ids, tokens, temperature, seed, stops, model):
        """Tokens, their log-probs under the distribution they were drawn from, which weights they are from, and why it ends."""
        with self.lock:
            self.lock.wait_for(lambda: not self.paused.is_set())
            self.writing += 1
        try:
            rng = torch.Generator().manual_seed(seed)
            ids, written, logprobs, versions = list(ids), [], [], []
            tokens = min(tokens, self.context - len(ids))  # silently, as vLLM does

            def so_far(reason):
                spans = [
                    {
                        "version": version,
                        "start": versions.index(version),
                        "end": versions.index(version) + versions.count(version),
                    }
                    for version in dict.fromkeys(versions)
                ]
                return written, logprobs, spans, reason

            while len(written) < tokens:
                if self.paused.is_set():
                    return so_far("abort")
                time.sleep(self.pause)
                logits = (model or self.model)(torch.tensor([ids])).logits[
                    0, -1
                ].float() / temperature
                probabilities = logits.softmax(-1)
                token = int(torch.multinomial(probabilities, 1, generator=rng))
                ids.append(token)
                written.append(token)
                logprobs.append(float(probabilities[token].log()))
                versions.append(self.version)
                if token in stops:
                    return so_far("stop")
            return so_far("length")
        finally:
            with self.lock:
                self.writing -= 1
                self.lock.notify_all()

    def stop(self):
        with self.lock:
            self.paused.set()
            self.lock.wait_for(lambda: self.writing == 0)

    def go_on(self):
        with self.lock:
            self.paused.clear()
            self.lock.notify_all()


def make_app(engine, kind="vllm"):
    """The two have the same verbs under other names."""

    async def health(_):
        return Response()

    async def world_size(_):
        return JSONResponse({"world_size": engine.receiver.workers})

    def route(path, handler):
        async def handle(request):
            asked = await request.json() if await request.body() else None
            engine.told.append(path)
            engine.ports.add(request.client.port)
            try:
                chosen = engine.refuse.get(path, handler)
                return JSONResponse(await run_in_threadpool(chosen, asked, request.query_params))
            except Refused as error:
                return JSONResponse({"error": str(error)}, error.code)

        return Route(path, handle, methods=["POST"])

    routes = (vllm if kind == "vllm" else sglang)(engine)
    return Starlette(
        routes=[
            Route("/health", health),
            Route("/get_world_size", world_size),
            *(route(path, handler) for path, handler in routes.items()),
        ]
    )


def needs(asked, *names):
    if asked is None or set(names) - asked.keys():
        raise Refused("bad request")


def adapter(engine, name):
    if name is None:
        return None
    if name not in engine.adapters:
        raise Refused(f"the model {name} does not exist", 404)
    return engine.adapters[name]


def adapters(engine):
    def load(asked, _):
        needs(asked, "lora_name", "lora_path")
        if asked["lora_name"] in engine.adapters:
            raise Refused("has already been loaded")
        engine.put_on(asked["lora_name"], asked["lora_path"])
        return {"success": True}

    def unload(asked, _):
        if engine.adapters.pop(asked["lora_name"], None) is None:
            raise Refused("cannot be found", 404)
        return {"success": True}

    return load, unload


def vllm(engine):
    def awake():
        if engine.asleep:
            raise Refused("the engine is asleep", 500)

    def sleep(_, query):
        assert query["level"] == "1" and engine.writing == 0
        engine.asleep = True

    def wake(_, query):
        engine.asleep = False

    def generate(asked, _):
        awake()
        needs(asked, "token_ids", "sampling_params")
        how = asked["sampling_params"]
        needs(
            how, "max_tokens", "temperature", "top_p", "top_k", "seed", "logprobs", "stop_token_ids"
        )
        if not all(isinstance(i, int) for i in asked["token_ids"]) or how["max_tokens"] < 1:
            raise Refused("bad request")
        model = adapter(engine, asked.get("model"))
        engine.asked.append(asked["token_ids"])
        drawing = how["temperature"], how["seed"], how["stop_token_ids"]
        ids, logprobs, spans, reason = engine.complete(
            asked["token_ids"], how["max_tokens"], *drawing, model
        )
        content = [
            {"token_id": i, "logprob": logprob, "rank": 1}
            for i, logprob in zip(ids, logprobs, strict=True)
        ]
        choice = {
            "index": 0,
            "token_ids": ids,
            "logprobs": {"content": content},
            "finish_reason": reason,
        }
        return {"choices": [choice | {"weight_versions": spans}]}

    def pause(_, query):
        assert query["mode"] == "abort"
        engine.stop()
        return {"status": "paused"}

    def resume(_, query):
        engine.go_on()
        return {"status": "resumed"}

    def rpc(asked, _):
        awake()
        if asked["method"] != "reload_weights" or not engine.paused.is_set():
            raise Refused("not now")
        engine.read(asked["kwargs"]["weights_path"])
        return {"results": [None]}

    def start(*asked):
        if not engine.paused.is_set():
            raise Refused("not now")
        return engine.receiver.start(*asked)

    def finish(*asked):
        """Load what was received: all, or nothing of an update that failed before. A tied head has no weights of its own."""
        done = engine.receiver.finish(*asked)
        if not engine.receiver.received:
            return done
        missing, unexpected = engine.model.load_state_dict(engine.receiver.received, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        return done

    def name(asked, _):
        engine.version = asked["new_version"]
        return {"success": True}

    load, unload = adapters(engine)
    return {
        "/inference/v1/generate": generate,
        "/pause": pause,
        "/resume": resume,
        "/sleep": sleep,
        "/wake_up": wake,
        "/collective_rpc": rpc,
        "/update_weight_version": name,
        "/init_weight_transfer_engine": engine.receiver.init,
        "/start_weight_update": start,
        "/update_weights": engine.receiver.update,
        "/finish_weight_update": finish,
        "/v1/load_lora_adapter": load,
        "/v1/unload_lora_adapter": unload,
    }


def sglang(engine):
    def generate(asked, _):
        needs(asked, "input_ids", "sampling_params", "return_logprob")
        how = asked["sampling_params"]
        needs(
            how,
            "max_new_tokens",
            "temperature",
            "top_p",
            "top_k",
            "sampling_seed",
            "stop_token_ids",
            "skip_special_tokens",
        )
        model = adapter(engine, asked.get("lora_path"))
        engine.asked.append(asked["input_ids"])
        drawing = how["temperature"], how["sampling_seed"], how["stop_token_ids"]
        ids, logprobs, spans, reason = engine.complete(
            asked["input_ids"], how["max_new_tokens"], *drawing, model
        )
        meta = {
            "finish_reason": {"type": reason},
            "weight_version": engine.version,
            "weight_versions": spans,
            "output_token_logprobs": [
                [logprob, token, None] for token, logprob in zip(ids, logprobs, strict=True)
            ],
        }
        return {"text": "", "output_ids": ids, "meta_info": meta}

    def pause(asked, _):
        assert asked["mode"] == "abort"
        engine.stop()
        return {"status": "ok"}

    def go_on(asked, _):
        needs(asked)
        engine.go_on()
        return {"status": "ok"}

    def update(asked, _):
        needs(asked, "model_path", "weight_version")
        engine.read(asked["model_path"])
        engine.version = asked["weight_version"]
        return {"success": True, "message": ""}

    load, unload = adapters(engine)
    return {
        "/generate": generate,
        "/pause_generation": pause,
        "/continue_generation": go_on,
        "/update_weights_from_disk": update,
        "/load_lora_adapter": load,
        "/unload_lora_adapter": unload,
    }


def main():
    torch.set_num_threads(1)
    engine = Engine(sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
    app = make_app(engine, *sys.argv[4:5])
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")


if __name__ == "__main__":
    main()
