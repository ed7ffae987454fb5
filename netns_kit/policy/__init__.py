"""Policies: which flows and which names a namespace may have, as data.

    Policy.deny().allow("example.org", ports=443) --> Rule, Rule ... --> Index --> Decision
                                                       Preset            Pins: the names an address was given for

A `Policy` is an immutable list of `Rule` with a default.  `Index` decides by it about a flow or a query.  A rule by
name is about addresses that our DNS has answered for that name; `Pins` keeps these.

Law of this package: no socket, no clock, no log.  An address is packed and canonical
(`netns_kit.policy.addresses.canonical`), a name is in wire form and lower case.
"""
