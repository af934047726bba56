"""The standardized table of *Faster and Lighter LLMs* (arXiv 2402.01799) for one model on this machine.

`methods` says what is compared, `measure` measures one of them in a process of its own, `run` collects, `page` and
`plots` show. Peers are files in `peers`.
"""
