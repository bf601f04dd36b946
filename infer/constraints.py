"""temporary until helper A's is merged"""


class Grammar: ...
