"""As much of Ray as a sweep uses, in this process: an actor is an object, and each of its calls a thread."""

import sys
import threading
import types
from typing import Any


class Call:
    """A call of an actor: its result, or its error, once it has one."""

    def __init__(self, method: Any, args: tuple[Any, ...]) -> None:
        self.over, self.result, self.error = threading.Event(), None, None

        def work() -> None:
            try:
                self.result = method(*args)
            except Exception as error:
                self.error = error
            self.over.set()

        threading.Thread(target=work, daemon=True).start()


class Method:
    def __init__(self, method: Any) -> None:
        self.method = method

    def remote(self, *args: Any) -> Call:
        return Call(self.method, args)


class Actor:
    def __init__(self, instance: Any) -> None:
        self.instance = instance

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self.instance, name))


class FakeRay(types.ModuleType):
    """The module. `started` has the options of each actor, `killed` the actors that were ended."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.is_up, self.given = False, {}
        self.started: list[dict[str, Any]] = []
        self.killed: list[Actor] = []

    def is_initialized(self) -> bool:
        return self.is_up

    def init(self, **given: Any) -> None:
        if given.get("address") == "nowhere:1":
            raise ConnectionError("Could not find any running Ray instance.")
        self.is_up, self.given = True, given

    def shutdown(self) -> None:
        self.is_up = False

    def remote(self, **options: Any) -> Any:
        def of(cls: type) -> Any:
            def create() -> Actor:
                self.started.append(options)
                return Actor(cls())

            return types.SimpleNamespace(remote=create)

        return of

    def wait(self, calls: list[Call], timeout: float) -> tuple[list[Call], list[Call]]:
        calls[0].over.wait(timeout)
        return ([c for c in calls if c.over.is_set()], [c for c in calls if not c.over.is_set()])

    def get(self, call: Call) -> Any:
        if call.error is not None:
            raise call.error
        return call.result

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)


def install(monkeypatch: Any) -> FakeRay:
    """Return the fake, which `import ray` finds until the test ends."""
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake
