"""Web pages and servers of megalora: a socket, uvicorn in a thread, and a guard in front. Needs the extra `serve`."""
