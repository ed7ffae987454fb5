"""The same objects without async, for scripts, notebooks and the REPL (docs/sync.md).

    from netns_kit import sync

    with sync.Network(ports=["127.0.0.1:8080:80"]) as net:
        net.run(["curl", "http://example.com"])

It has every public name of `netns_kit`: classes with async methods in their synchronous form, the others as they are.
Names are imported when they are asked for.
"""

import netns_kit as _netns_kit

_OWN = "ByteReceiveStream ByteSendStream Iteration SocketListener SocketStream open_network".split()

__all__ = [str(name) for name in (*vars(_netns_kit)["__all__"], *_OWN)]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import facade

    streams = {each.__name__: each for each in facade.STREAMS}
    value: object
    if name in streams:
        value = facade.synchronous(streams[name])
    elif name in _OWN:
        value = getattr(facade, name)
    elif name in facade.FORMS:
        value = facade.synchronous(getattr(_netns_kit, name))
    else:
        value = getattr(_netns_kit, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
