namespace FlexLLM;

/// <summary>Base of the errors that this library reports about its inputs and its state.</summary>
public class FlexLlmException : Exception
{
    /// <summary>Creates the error with a plain message.</summary>
    public FlexLlmException(string message)
        : base(message)
    {
    }

    /// <summary>Creates the error with a plain message and its cause.</summary>
    public FlexLlmException(string message, Exception? innerException)
        : base(message, innerException)
    {
    }
}

/// <summary>A file that cannot be used: a malformed checkpoint, config, tokenizer, adapter or dataset line.</summary>
public sealed class InvalidFileException : FlexLlmException
{
    /// <summary>Creates the error from its three parts.</summary>
    /// <param name="file">Path of the file.</param>
    /// <param name="field">The field, tensor or line at fault.</param>
    /// <param name="fault">What is wrong with it, and what would be right.</param>
    /// <param name="innerException">The cause, where another exception led to this one.</param>
    public InvalidFileException(string file, string field, string fault, Exception? innerException = null)
        : base($"{file}: {field}: {fault}", innerException)
    {
        File = file;
        Field = field;
        Fault = fault;
    }

    /// <summary>Path of the file.</summary>
    public string File { get; }

    /// <summary>The field, tensor or line at fault.</summary>
    public string Field { get; }

    /// <summary>What is wrong with it.</summary>
    public string Fault { get; }
}

/// <summary>A request or job that the engine will not take: bad parameters, unknown adapter, too long, does not fit.</summary>
public sealed class RequestRejectedException : FlexLlmException
{
    /// <summary>Creates the error.</summary>
    /// <param name="message">Why the request is refused, and what would be accepted.</param>
    public RequestRejectedException(string message)
        : base(message)
    {
    }
}

/// <summary>The engine stopped because an invariant broke or its backend failed; every waiter gets this with the cause.</summary>
public sealed class EngineFaultedException : FlexLlmException
{
    /// <summary>Creates the error.</summary>
    /// <param name="message">What happened.</param>
    /// <param name="innerException">The cause.</param>
    public EngineFaultedException(string message, Exception? innerException)
        : base(message, innerException)
    {
    }
}
