"""Job types for CCP-EM Doppio and the ccpem-pipeliner, which finds them by their entry points.

The pipeliner runs the same commands as RELION and the command line; only this room knows it, and
nothing else imports this room. It needs the optional extra ``[doppio]``.
"""
