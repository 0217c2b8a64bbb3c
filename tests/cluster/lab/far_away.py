"""A long way to another machine: a proxy that lets every byte take its time. Kernels without netem have no other.

python far_away.py ADDRESS PORT HOST HOST_PORT SECONDS     each way; listens on ADDRESS:PORT
"""

import asyncio
import sys

ROUND_TRIP_S = 0.06
"""From one end of a continent to the other, or across an ocean."""


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    """Everything in order, each piece `delay_s` after it came."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due, piece = await pieces.get()
            await asyncio.sleep(due - loop.time())
            if not piece:
                writer.close()
                return
            writer.write(piece)

    delivery = asyncio.create_task(deliver())
    try:
        while piece := await reader.read(65536):
            pieces.put_nowait((loop.time() + delay_s, piece))
    except ConnectionError:
        pass  # the other direction ends as well
    pieces.put_nowait((loop.time() + delay_s, b""))
    await delivery


async def serve(address: str, port: int, host: str, host_port: int, delay_s: float) -> None:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, host_port)
        await asyncio.gather(carry(reader, back, delay_s), carry(there, writer, delay_s), return_exceptions=True)

    server = await asyncio.start_server(connect, address, port)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5])))
