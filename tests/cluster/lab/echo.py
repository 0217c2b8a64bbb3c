"""Stands where Ray's services would: listens on every port of a node and says which node it is.

python -m tests.cluster.lab.echo INDEX MAX_CPUS          answers "node INDEX" and sends back what it reads
python -m tests.cluster.lab.echo ask MAX_CPUS INDEX...   asks each of these nodes on three ports, prints JSON
"""

import json
import socket
import socketserver
import sys
import threading
import time

from cluster.network.addresses import NodeAddress


class Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(f"node {index}\n".encode())
        while data := self.request.recv(65536):
            self.request.sendall(data)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def ask(address: NodeAddress) -> list[str]:
    """What the first, a middle and the last port of a node answer."""
    answers = []
    for port in (address.ports[0], address.node_manager_port, address.ports[-1]):
        try:
            with socket.create_connection((address.alias, port), 15) as connection:
                answers.append(connection.makefile().readline().strip())
        except OSError as error:
            answers.append(type(error).__name__)
    return answers


def talk(address: NodeAddress) -> None:
    with socket.create_connection((address.alias, address.ports[-1]), 15) as connection:
        connection.settimeout(10)
        stream = connection.makefile("rw")
        stream.readline()
        print("talking", flush=True)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            stream.write("word\n")
            stream.flush()
            if stream.readline() != "word\n":
                raise ConnectionError("the connection was lost")
            time.sleep(0.05)
    print("done", flush=True)


if sys.argv[1] == "talk":
    talk(NodeAddress(int(sys.argv[3]), int(sys.argv[2])))
elif sys.argv[1] == "ask":
    print(json.dumps({number: ask(NodeAddress(int(number), int(sys.argv[2]))) for number in sys.argv[3:]}))
else:
    index = int(sys.argv[1])
    here = NodeAddress(index, int(sys.argv[2]))
    servers = [Server((here.alias, port), Handler) for port in here.ports]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    threading.Event().wait()
