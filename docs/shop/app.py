"""Count visits in redis, over HTTP on port 8000."""

import http.server
import socket
import sys


class Visits(http.server.BaseHTTPRequestHandler):
    """Answers each request with the number of visits so far."""

    def do_GET(self) -> None:
        with socket.create_connection(("db", 6379), 20) as db:
            db.sendall(b"INCR visits\r\n")
            visits = db.recv(99).decode().strip(":\r\n")
        body = f"visit {visits}, served by {sys.argv[1]}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Visits).serve_forever()
