"""Other projects' mHC kernels where they are installed: how each is called, and in which layout.

One file a peer, each a ``Contender``. The bench times them, ``kernels report --roofline --peers``
predicts them; nothing of a peer is copied, and none is imported before it is asked for.
"""
