"""An imitation of Vast.ai: its API, its marketplace and the life of its instances.

`state.FakeVast` is the marketplace and the truth about what is billed; `api.FakeApi` speaks HTTP's words about it, with
faults on order; `transport.FakeTransport` connects a client in the same process, `server.FakeServer` any client. Behind
each instance there may be a `machines.Machine`; without one an instance is only state.
"""
