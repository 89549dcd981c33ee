"""Request and response models of the HTTP API, shared by the server and the client; loads neither FAISS nor torch."""
