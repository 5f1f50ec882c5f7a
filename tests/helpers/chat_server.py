"""A stand-in for vLLM's server that starts at once: python -m tests.helpers.chat_server --port 8000."""

import argparse
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

METRICS = """\
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
vllm:kv_cache_usage_perc{engine="0",model_name="stand-in"} 0.25
vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="101",num_gpu_blocks_override="None"} 1.0
"""
WORDS = ["a ", "large ", "circle"]


class Handler(BaseHTTPRequestHandler):
    """Answers each question with `WORDS`, one an event, and remembers it."""

    def log_message(self, *arguments):
        pass

    def send(self, content, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content.encode())

    def do_GET(self):
        pages = {"/health": "", "/metrics": METRICS, "/v1/models": json.dumps({"data": [{"id": "stand-in"}]})}
        if self.path in pages:
            self.send(pages[self.path])
        else:
            self.send("", 404)

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.questions.append(question)
        if question["model"] == "broken":
            self.send(json.dumps({"error": {"message": "budget=7 was not tuned"}}), 400)
            return

        events = [{"choices": [{"delta": {"content": word}}]} for word in WORDS]
        events.append({"choices": [], "usage": {"prompt_tokens": 99, "completion_tokens": len(WORDS)}})
        self.send("".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")


def start_chat_server(port=0):
    """Start it in a thread. Its `questions` are those that it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.questions = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--model")
    arguments, _ = parser.parse_known_args()
    if arguments.model == "broken":
        sys.exit("ValueError: UserError: format 2 is unknown")

    # vLLM has workers too, which must not outlive it.
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(f"worker {worker.pid}", flush=True)
    start_chat_server(arguments.port)
    threading.Event().wait()
