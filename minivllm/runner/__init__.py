"""One rank of the computing tower: it turns a `Batch` of ints into token ids, and never sees a request."""
