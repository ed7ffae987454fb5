"""EchoFlow: one guest address and identifier pinging one other address (RFC 5508)."""

from __future__ import annotations

from .flows import IdleFlow, IdleTable
from .network_layer import NetworkLayer
from .user import EchoUser, IcmpError, Refusal
from .wire import flow_key, icmp, ip


class EchoFlow(IdleFlow):
    """One flow.  `key` is guest address, other address, identifier as on the wire, and two zero bytes."""

    __slots__ = ()

    user: EchoUser

    @property
    def lifetime(self) -> float:
        """Seconds that the flow may be idle."""
        return self._table.limits.echo

    @property
    def identifier(self) -> int:
        """Identifier of the guest's requests."""
        return flow_key.parse(self.key).guest_port

    def reply(
        self, sequence: int, payload: bytes | memoryview, ttl: int, now: float, *, tos: int = 0
    ) -> None:
        """Send an echo reply to the guest, from the other address."""
        self.last = now
        self.sent += len(payload)
        self._table.packets.echo_reply(
            flow_key.addresses(self.key), self.identifier, sequence, payload, ttl=ttl, tos=tos
        )

    def refuse(
        self,
        why: Refusal | IcmpError,
        sequence: int = 0,
        payload: bytes | memoryview = b"",
        check: int | None = None,
    ) -> None:
        """Send the guest an ICMP error about a request.

        Args:
            why: The error.
            sequence: The sequence number of the request.
            payload: As much of the request's payload as is known.
            check: The checksum of the whole request; None: that of the known part.
        """
        family = flow_key.family_of(self.key)
        message = icmp.HEADER.pack(family.echo, 0, check or 0, self.identifier, sequence) + payload
        if check is None:
            addresses = flow_key.addresses(self.key)
            message = ip.sum_into(message, addresses, family.icmp, icmp.CHECKSUM_AT)
        self._table.packets.error_about(self.key, family.icmp, message, why)


class EchoTable(IdleTable[EchoFlow]):
    """The echo flows of a stack."""

    def __init__(self, network: NetworkLayer) -> None:
        super().__init__("icmp", network, network.limits.echo_flows)

    def request_arrives(self, packet: ip.Packet, message: icmp.Message, now: float) -> None:
        """Handle an echo request to an address that is not ours: it belongs to a flow, or opens one."""
        key = packet.addresses + packet.payload[4:6] + bytes(2)
        flow = self.get(key)
        if flow is None:
            self.network.admit(packet)
            if len(self) >= self.limit:
                self.dropped["limit-echo-flows"] += 1
                self.evict()
            flow = EchoFlow(self, key, now)
            self.add(flow)
            refusal = self.network.user.echo_opened(flow)
            if refusal is not None:
                self.turn_away(flow, refusal, packet)
                return
        flow.last = now
        flow.received += len(message.payload)
        flow.user.echo(flow, message.low, message.payload, packet)
