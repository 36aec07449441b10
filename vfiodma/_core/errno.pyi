from ..errors import VfioError

def error(err: int, operation: str, iova: int | None = None, size: int | None = None, hint: str = "",
          message: str | None = None) -> VfioError: ...
