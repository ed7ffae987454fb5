"""Look around in a capture: `python explore.py CAPTURE [WORD]...`."""

from __future__ import annotations

import argparse
import html
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from netns_kit import CapturedPacket, NetnsKitError, Packets, TcpConversation, read_capture

FAILURES = "NXDOMAIN", "SERVFAIL", "REFUSED"  # of DNS
ERRORS = "unreachable", "time exceeded", "parameter problem", "packet too big"  # of ICMP
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>:root {{ color-scheme: light dark }} body {{ font-family: sans-serif; margin: 2em }}</style></head>
<body><h1>{title}</h1><pre>{overview}</pre>{parts}</body></html>
"""


def fields(packet: CapturedPacket) -> dict[str, str]:
    """Return the fields of all layers; of a name that several have, the innermost."""
    return {key: value for layer in packet.layers for key, value in layer.fields}


def has(packets: Packets, packet: CapturedPacket, words: Sequence[str]) -> bool:
    """Return whether a packet has all words: in a line of a layer, its direction, or the names of its ends."""
    found = fields(packet)
    names = [packets.names.get(found.get(end, ""), "") for end in ("source", "destination")]
    lines = [f"{layer.name} {layer.summary}" for layer in packet.layers]
    text = "\n".join([*lines, packet.direction, packet.comment, *names]).lower()
    return all(word.lower() in text for word in words)


def failure(packet: CapturedPacket) -> str:
    """Return what a packet says of a failure; empty if it says nothing of one."""
    found = fields(packet)
    for layer in packet.layers:
        if (
            layer.name == "malformed"
            or (layer.name == "DNS" and layer.summary.endswith(FAILURES))
            or (layer.name.startswith("ICMP") and layer.summary.endswith(ERRORS))
            or (layer.name == "TCP" and "RST" in found["flags"])
        ):
            return f"{found.get('source')} → {found.get('destination')} {layer.name}: {layer.summary}"
    return ""


def ending(connection: TcpConversation) -> str:
    """Return how far a TCP connection has come in the capture."""
    flags: dict[tuple[str, str], set[str]] = {}  # of each side
    for found in map(fields, connection.packets):
        flags.setdefault((found["source"], found["ports"]), set()).update(found["flags"].split())
    if "RST" in set().union(*flags.values()):
        return "reset"
    if len(flags) == 1:
        return "not answered"
    return ("open", "half closed", "finished")[sum("FIN" in each for each in flags.values())]


def overview(packets: Packets) -> Iterator[str]:
    """Yield the lines that say what there is in a capture."""
    seconds = packets[-1].time if packets else 0.0
    yield f"{len(packets)} packets, {sum(packet.size for packet in packets)} bytes, {seconds:.3f} s"
    protocols = Counter(packet.layers[-1].name for packet in packets)
    yield "protocols: " + ", ".join(f"{name} {times}" for name, times in protocols.most_common())
    connections = packets.tcp()
    yield f"TCP connections: {len(connections)}"
    for number, each in enumerate(connections, 1):
        name = f" ({each.names[1]})" if each.names[1] else ""
        bytes_ = sum(packet.size for packet in each.packets)
        yield f"{number:>5}  {each.opener} → {each.other}{name}, {bytes_} bytes, {ending(each)}"
    failures = [(packet.number, said) for packet in packets if (said := failure(packet))]
    yield f"failures: {len(failures)}"
    for number, said in failures:
        yield f"{number:>5}  {said}"


def page(title: str, packets: Packets) -> str:
    """Return a page of HTML with all of it, which needs no other file and no script."""
    parts = [packets._repr_html_()]  # as a notebook shows it
    shown = [(f"Connection {number}", each._repr_html_()) for number, each in enumerate(packets.tcp(), 1)]
    shown += [(f"Packet {each.number}", each._repr_html_()) for each in packets]
    parts += [f"<details><summary>{label}</summary>{text}</details>" for label, text in shown]
    told = html.escape("\n".join(overview(packets)))
    return PAGE.format(title=html.escape(title), overview=told, parts="\n".join(parts))


def main() -> int:
    """Read the command line, and show what it asks for."""
    parser = argparse.ArgumentParser(description="Look around in a capture of netns_kit.")
    parser.add_argument("capture", type=Path)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only packets that have all of them")
    show = parser.add_mutually_exclusive_group()
    show.add_argument("--list", action="store_true", help="show the packets, a line for each")
    show.add_argument("--packet", type=int, metavar="N", help="show one, layer by layer")
    show.add_argument("--connection", type=int, metavar="N", help="show a TCP connection, by its number")
    show.add_argument("--html", type=Path, metavar="FILE", help="write all of it into a page")
    given = parser.parse_args()
    try:
        packets = read_capture(given.capture)
    except NetnsKitError as error:
        parser.error(str(error))
    found = Packets.of((each for each in packets if has(packets, each, given.words)), packets.names)
    if given.packet is not None:
        print(next((each for each in found if each.number == given.packet), "there is no such packet"))
    elif given.connection is not None:
        print(dict(enumerate(found.tcp(), 1)).get(given.connection, "there is no such connection"))
    elif given.html:
        given.html.write_text(page(given.capture.name, found), encoding="utf-8")
    else:
        print(found if given.list else "\n".join(overview(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
