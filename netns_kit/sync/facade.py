"""The synchronous form of the library's classes: made from these, so that there is no second copy of anything.

`synchronous(kind)` makes the class for one with async methods.  Its methods have the signatures and the docstrings
of that class, do what it does on the event loop of `netns_kit.sync.loop_thread`, and put results in their
synchronous form.  What type checkers see is in the stub of this package, which `python -m tests.sync_stub` writes
from the same classes.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, NoReturn, TypeVar
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread
from anyio.abc import ByteReceiveStream, ByteSendStream, SocketListener, SocketStream
from typing_extensions import Self

import netns_kit
from netns_kit import arguments
from netns_kit.errors import ArgumentTypeError, NetnsKitError

from .loop_thread import PATIENCE, LoopThread, loop_thread

__tracebackhide__ = True  # pytest shows what is called, and not the way there
MODULE = "netns_kit.sync"
FORMS = frozenset(
    "Application Capture FakeFlow FakeHost FakeInternet FaultsBlock Forwarder GuestDatagrams GuestServer GuestStream "
    "ImpairedTap InterceptedDatagrams InterceptedStream Interceptor Member Namespace Network NetworkRoute Process "
    "TapDevice UpstreamDatagrams UpstreamStream UserStack".split()
)
"""The public classes that have a synchronous form."""
STREAMS = (SocketStream, SocketListener, ByteReceiveStream, ByteSendStream)
"""The classes of anyio that have one: a value of several of them has the form of the first."""
MADE_BY_CALLERS = frozenset({"Application", "FakeInternet", "Forwarder", "Network", "UserStack"})
HANDLERS = frozenset({"handler", "on_flow", "to"})
"""The parameters that take an async function, in whose place a plain one stands here."""
INTERNAL = frozenset(
    "ask guests hand member_of pass_socket serve setup supervisor supply_sockets world".split()
)
"""The names that are for parts of the library, or for async code alone."""
UPLINKS = "netns_kit.uplink."
"""The classes whose methods the engine calls, on its thread."""
RENAMED = {
    "aclose": "close",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
}
DECORATORS = frozenset({"tcp", "udp"})
"""The methods of a `FakeHost` that return a decorator."""

F = TypeVar("F", bound=Callable[..., object])
_forms: WeakValueDictionary[int, Facade] = WeakValueDictionary()
_classes: dict[type, type[Facade]] = {}
_making = threading.RLock()


class Facade:
    """Base class of the synchronous objects.  `_wrapped` is the object that each stands for."""

    __slots__ = ("__weakref__", "_loop", "_wrapped")
    _kind: ClassVar[type]
    _wrapped: Any
    _loop: LoopThread

    def __init__(self, *args: object, **options: object) -> None:
        if self._kind.__name__ not in MADE_BY_CALLERS:
            raise TypeError(
                f"a {type(self).__name__} is made by calls of other objects, as their docstrings say"
            )

        async def make() -> object:
            return self._kind(*given(args), **given_options(options))

        self._loop = loop_thread()
        self._wrapped = self._loop.call(type(self).__name__, make)
        _forms[id(self._wrapped)] = self

    def __repr__(self) -> str:
        return f"<sync {repr(self._wrapped).removeprefix('<').removesuffix('>')}>"

    def __str__(self) -> str:
        form: object = type(self._wrapped).__str__
        return repr(self) if form == object.__str__ else str(self._seen(str, self._wrapped))

    def __eq__(self, other: object) -> bool:
        return self._wrapped == other._wrapped if isinstance(other, Facade) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._wrapped)

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise TypeError(f"cannot pickle or copy a {type(self).__name__}: it is in use in this process")

    def _call(
        self, function: Callable[..., Any], args: Sequence[object], options: Mapping[str, object]
    ) -> Any:
        """Call a function on the event loop, await what it returns if it can be, and return its synchronous form."""

        async def act() -> object:
            result = function(*args, **options)
            if isinstance(result, Awaitable):
                result = await result
                self._loop.opened(result)
            return result

        try:
            return synchronized(self._loop.call(type(self).__name__, act))
        except NetnsKitError as error:
            error.fix = spoken(error.fix)
            raise

    def _seen(self, function: Callable[..., Any], *args: object) -> Any:
        """Call a function that shows the object: on the event loop, or here if there is none any more."""
        return self._call(function, args, {}) if self._loop.is_there else function(*args)


class Iteration(Facade):
    """An iterator over what comes in time, such as events.  It is closed at its end, by `close`, or by its block."""

    __slots__ = ()
    _kind = AsyncGenerator

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return _advance(self)

    def close(self) -> None:
        """End the iteration.  Calling it again is allowed."""
        if self._loop.is_there:
            self._call(_closed, (self._wrapped,), {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _closed(iteration: Any) -> None:
    # a step whose caller has been interrupted twice may be about to end still
    with anyio.move_on_after(PATIENCE):
        while getattr(iteration, "ag_running", False):  # noqa: ASYNC110  # there is no event
            await anyio.sleep(0.01)
    await iteration.aclose()


def _advance(self: Facade) -> Any:
    try:
        return self._call(anext, (self._wrapped,), {})
    except StopAsyncIteration:
        raise StopIteration from None


@arguments.spelled_out(netns_kit.Network)
def open_network(**options: Any) -> Facade:
    """Return a `Network` that is open: `net = sync.open_network()`, and `net.close()` in a later cell of a notebook.

    It is closed when the interpreter exits, if not before.

    Args:
        options: As for `Network`.

    Raises:
        ArgumentError, ArgumentTypeError, NetnsKitError, OSError: As `Network` and its `open` raise them.
    """
    network: Any = synchronous(netns_kit.Network)
    opened: Facade = network(**options).open()
    return opened


# -- values ------------------------------------------------------------------------------------------------


def given(values: tuple[object, ...]) -> tuple[object, ...]:
    """Return arguments as the async objects take them."""
    return tuple(each._wrapped if isinstance(each, Facade) else each for each in values)


def given_options(options: Mapping[str, object]) -> dict[str, object]:
    return {
        name: in_thread(value, name) if name in HANDLERS else value
        for name, value in zip(options, given(tuple(options.values())), strict=True)
    }


def in_thread(handler: Any, name: str) -> Any:
    """Return an async function that calls a plain one in a thread; what is no function is returned as it is."""
    if not callable(handler):
        return handler
    called = type(handler).__call__
    if inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(called):
        fix = "write `def`, or use the async objects of netns_kit"
        raise ArgumentTypeError("expected a plain function", name, arguments.shown(handler), fix)

    def call(thing: object) -> object:
        try:
            return handler(synchronized(thing))
        except Exception:
            raise
        except BaseException as error:  # it would end the event loop, which is not the handler's to end
            raise RuntimeError(f"the function has ended by {type(error).__name__}") from error

    async def handle(thing: object) -> object:
        alone = anyio.CapacityLimiter(1)  # who calls handlers bounds their number
        return await anyio.to_thread.run_sync(call, thing, abandon_on_cancel=True, limiter=alone)

    return handle


def synchronized(value: Any) -> Any:
    """Return the synchronous form of a value, and of what is in a list, tuple, dict or deque; or the value itself."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind(map(synchronized, value))
    if kind is deque:
        return deque(map(synchronized, tuple(value)), value.maxlen)
    if kind is dict:
        return {name: synchronized(each) for name, each in value.items()}
    form = form_of(kind)  # type: ignore[arg-type]  # mypy takes a type[Any] for something without a hash
    if form is None:
        return value
    made = _forms.get(id(value))
    if made is None:
        made = form.__new__(form)
        made._wrapped, made._loop = value, loop_thread()
        made = _forms.setdefault(id(value), made)
    return made


@cache
def form_of(kind: Hashable) -> type[Facade] | None:
    """Return the synchronous form of a class, or None if it has none."""
    assert isinstance(kind, type)
    if issubclass(kind, AsyncGenerator):
        return Iteration
    ours = next(lineage(kind), None)
    if ours is not None:
        return synchronous(ours)
    stream = next((each for each in STREAMS if issubclass(kind, each)), None)
    return None if stream is None else synchronous(stream)


# -- classes -----------------------------------------------------------------------------------------------


def lineage(kind: type) -> Iterator[type]:
    """Yield the classes of `FORMS` that a class is, or is a subclass of."""
    for each in kind.__mro__:
        if each.__name__ in FORMS and each.__module__.startswith("netns_kit."):
            yield each


def public(kind: type) -> dict[str, Any]:
    """Return the attributes that the synchronous form of a class has, by the names that they have in `kind`.

    Those that only instances have, which annotations tell, have the value None.
    """
    found: dict[str, Any] = {}
    for each in reversed(kind.__mro__):
        if each.__module__.startswith(("netns_kit.", "anyio.")) and not each.__module__.startswith(UPLINKS):
            found.update(dict.fromkeys(inspect.get_annotations(each)))
            found.update(vars(each))
    return {
        name: value
        for name, value in found.items()
        if name not in INTERNAL
        and (
            name in RENAMED or name == "__getitem__" or name.startswith("_repr_") or not name.startswith("_")
        )
    }


def synchronous(kind: type) -> type[Facade]:
    """Return the synchronous form of a class."""
    with _making:  # no class has two
        return _classes.get(kind) or _classes.setdefault(kind, _made(kind))


def _made(kind: type) -> type[Facade]:
    above = next((each for each in lineage(kind) if each is not kind), None)
    base = Facade if above is None else synchronous(above)
    form = type(kind.__name__, (base,), {"__slots__": (), "__module__": MODULE, "_kind": kind})
    if kind.__name__ in MADE_BY_CALLERS:

        def init(self: Facade, *args: object, **options: object) -> None:
            Facade.__init__(self, *args, **options)

        form.__init__ = _alike(init, getattr(kind, "__init__"))  # type: ignore[misc]  # noqa: B009 # it is none of a subclass
    form.__doc__ = spoken(inspect.getdoc(kind))
    for name, value in public(kind).items():
        if isinstance(value, classmethod):
            attribute: object = classmethod(_class_method(kind, value.__func__))
        elif isinstance(value, property):
            attribute = property(_reader(name), doc=spoken(value.__doc__))
        elif inspect.isfunction(value):
            attribute = _SPECIAL.get(name, _method)(name, value)
        else:
            attribute = _plain(name)
        own = getattr(attribute, "__func__", attribute)
        if inspect.isfunction(own) and own.__module__ == MODULE:
            own.__qualname__ = f"{form.__name__}.{own.__name__}"
        setattr(form, RENAMED.get(name, name), attribute)
    return form


def _alike(function: F, source: Callable[..., object]) -> F:
    """Give a function the name, the signature and the docstring of the one it stands for."""
    signature = inspect.signature(source)
    kept = [each for each in signature.parameters.values() if "TaskStatus" not in str(each.annotation)]
    returns = re.sub(r"^AsyncGenerator\[(\w+)(, None)?\]", r"Iteration[\1]", str(signature.return_annotation))
    function.__name__ = RENAMED.get(source.__name__, source.__name__)
    function.__module__, function.__doc__ = MODULE, spoken(inspect.getdoc(source))
    vars(function)["__signature__"] = signature.replace(
        parameters=kept, return_annotation=returns if signature.return_annotation else inspect.Signature.empty
    )
    return function


def spoken(doc: str | None) -> str | None:
    """Return a docstring without what is about async code."""
    if doc is None:
        return None
    for before, after in (
        (r"\basync (with|for|def)\b", r"\1"),
        (r"\bawait its\b", "call its"),
        (r"\bawait ", ""),
        (r"\b([Aa])n async function\b", r"\1 function"),
        (r"(?m)^( *)Cancellation:", r"\1Interruption:"),
    ):
        doc = re.sub(before, after, doc)
    return doc


def _method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    parameters = enumerate(list(inspect.signature(function).parameters)[1:])
    handlers = {index: each for index, each in parameters if each in HANDLERS}

    def method(self: Facade, /, *args: object, **options: object) -> Any:
        passed = list(given(args))
        for index, parameter in handlers.items():
            passed[index : index + 1] = [in_thread(each, parameter) for each in passed[index : index + 1]]
        result = self._call(getattr(self._wrapped, name), passed, given_options(options))
        return _decorator(result) if name in DECORATORS else result

    return _alike(method, function)


def _class_method(kind: type, function: Callable[..., Any]) -> Callable[..., Any]:
    def method(cls: type[Facade], /, *args: object, **options: object) -> Any:
        maker = Facade.__new__(cls)
        maker._loop = loop_thread()
        return maker._call(function, (kind, *given(args)), given_options(options))

    return _alike(method, function)


def _decorator(decorate: Callable[[Any], object]) -> Callable[[F], F]:
    def decorated(handler: F) -> F:
        decorate(in_thread(handler, "handler"))
        return handler

    return decorated


def _reader(name: str) -> Callable[[Facade], Any]:
    """Return what reads a property, whose code runs on the event loop like any other."""

    def read(self: Facade) -> Any:
        return self._call(getattr, (self._wrapped, name), {})

    return read


def _plain(name: str) -> property:
    """Return the property for an attribute that is no code."""

    def read(self: Facade) -> Any:
        return synchronized(getattr(self._wrapped, name))

    def write(self: Facade, value: object) -> None:
        setattr(self._wrapped, name, *given((value,)))

    return property(read, write)


def _closing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    async def act(loop: LoopThread, wrapped: object, *args: object) -> object:
        try:
            return await getattr(wrapped, name)(*args)
        finally:
            loop.closed(wrapped)

    def closing(self: Facade, /, *args: object) -> Any:
        if not self._loop.is_there:  # nothing is open: `atexit` functions and forked children may close too
            return None
        return self._call(act, (self._loop, self._wrapped, *args), {})

    return _alike(closing, function)


def _showing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def showing(self: Facade, /, *args: object) -> Any:
        return self._seen(getattr(self._wrapped, name), *args)

    return _alike(showing, function)


def _iter(*_: object) -> Callable[[Facade], Facade]:
    return lambda self: self


def _next(*_: object) -> Callable[[Facade], Any]:
    return _advance


_SPECIAL: dict[str, Callable[[str, Callable[..., Any]], Callable[..., Any]]] = {
    "close": _closing,
    "aclose": _closing,
    "__aexit__": _closing,
    "_repr_html_": _showing,
    "_repr_pretty_": _showing,
    "__aiter__": _iter,
    "__anext__": _next,
}
