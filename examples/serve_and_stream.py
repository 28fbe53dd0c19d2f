"""Serve the demo model on two ranks, and stream a chat with OpenAI's client (pip install openai)."""

import subprocess
import sys

from openai import OpenAI

COMMAND = (sys.executable, "-m", "narrows", "serve", "narrows-demo", "--tp", "2", "--port", "0")


def main() -> None:
    server = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()  # ... is ready at http://127.0.0.1:PORT ...
        url = next(word for word in ready.split() if word.startswith("http://"))
        with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            chat = client.chat.completions.create(
                model="narrows-demo",
                messages=[{"role": "user", "content": "What is 47 + 38?"}],
                max_tokens=32,
                stream=True,
            )
            for chunk in chat:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            print()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
