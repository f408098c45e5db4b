"""What Quartet asks of vLLM, on a tiny model: `python -m tests.fake_vllm PORT FOLDER [SECONDS PER TOKEN]`.

The endpoints, their fields and what they refuse are vLLM's; the sampling is a plain loop without a cache.
"""

import sys
import threading
import time

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from quartet.models.language_model import load_model


class Engine:
    def __init__(self, folder, pause=0.0):
        self.model, self.pause = load_model(folder), pause
        self.paused, self.writing, self.lock = threading.Event(), 0, threading.Condition()
        self.asked = []

    @torch.inference_mode()
    def complete(self, request):
        """Tokens and their log-probs under the distribution they were drawn from, until it ends or is aborted."""
        with self.lock:
            self.lock.wait_for(lambda: not self.paused.is_set())
            self.writing += 1
        try:
            rng = torch.Generator().manual_seed(request["seed"])
            ids, written, logprobs = list(request["prompt"]), [], []
            while len(written) < request["max_tokens"]:
                if self.paused.is_set():
                    return written, logprobs, "abort"
                time.sleep(self.pause)
                logits = self.model(torch.tensor([ids])).logits[0, -1].float() / request["temperature"]
                probabilities = logits.softmax(-1)
                token = int(torch.multinomial(probabilities, 1, generator=rng))
                ids.append(token)
                written.append(token)
                logprobs.append(float(probabilities[token].log()))
                if token in request["stop_token_ids"]:
                    return written, logprobs, "stop"
            return written, logprobs, "length"
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


def make_app(engine):
    async def health(_):
        return Response()

    async def completions(request):
        asked = await request.json()
        needed = {"prompt", "max_tokens", "temperature", "seed", "logprobs", "return_token_ids", "stop_token_ids"}
        if needed - asked.keys() or not all(isinstance(i, int) for i in asked["prompt"]) or asked["max_tokens"] < 1:
            return JSONResponse({"error": "bad request"}, 400)
        engine.asked.append(asked)
        ids, logprobs, reason = await run_in_threadpool(engine.complete, asked)
        choice = {"index": 0, "text": "", "token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}
        return JSONResponse({"choices": [choice]})

    async def pause(request):
        assert request.query_params["mode"] == "abort"
        await run_in_threadpool(engine.stop)
        return JSONResponse({"status": "paused"})

    async def resume(_):
        await run_in_threadpool(engine.go_on)
        return JSONResponse({"status": "resumed"})

    async def rpc(request):
        asked = await request.json()
        if asked["method"] != "reload_weights" or not engine.paused.is_set():
            return JSONResponse({"error": "not now"}, 400)
        engine.model = load_model(asked["kwargs"]["weights_path"])
        return JSONResponse({"results": [None]})

    routes = [Route("/health", health)]
    routes += [
        Route(path, handler, methods=["POST"])
        for path, handler in (
            ("/v1/completions", completions),
            ("/pause", pause),
            ("/resume", resume),
            ("/collective_rpc", rpc),
        )
    ]
    return Starlette(routes=routes)


def main():
    torch.set_num_threads(1)
    engine = Engine(sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
    uvicorn.run(make_app(engine), host="127.0.0.1", port=int(sys.argv[1]), log_level="error")


if __name__ == "__main__":
    main()
