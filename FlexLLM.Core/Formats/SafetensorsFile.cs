using System.Buffers.Binary;
using System.IO.MemoryMappedFiles;

namespace FlexLLM.Formats;

/// <summary>
/// A memory-mapped safetensors file, checked as a whole when opened. Nothing is copied: tensors point into the mapping and
/// end with it. Reading is thread-safe, disposing while another thread reads is not; neither is truncating the file.
/// </summary>
internal sealed unsafe class SafetensorsFile : IDisposable
{
    private readonly MemoryMappedFile _file;
    private readonly MemoryMappedViewAccessor _view;
    private readonly Dictionary<string, SafetensorsTensor> _tensors = [];
    private byte* _data;

    private SafetensorsFile(string path, MemoryMappedFile file, long fileBytes)
    {
        Path = path;
        _file = file;
        _view = file.CreateViewAccessor(0, fileBytes, MemoryMappedFileAccess.Read);
        byte* start = null;
        _view.SafeMemoryMappedViewHandle.AcquirePointer(ref start);
        start += _view.PointerOffset;
        _data = start;
        try
        {
            ulong declared = BinaryPrimitives.ReadUInt64LittleEndian(new ReadOnlySpan<byte>(start, 8));
            int length = SafetensorsHeader.CheckLength(declared, fileBytes, path);
            var json = new ReadOnlySpan<byte>(start + 8, length);
            SafetensorsHeader header = SafetensorsHeader.Parse(json, fileBytes - 8 - length, path);
            _data = start + 8 + length;
            Metadata = header.Metadata;
            foreach (SafetensorsHeader.Entry entry in header.Tensors)
            {
                _tensors.Add(entry.Name, new SafetensorsTensor(this, entry));
            }
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public string Path { get; }

    /// <summary>The strings under "__metadata__".</summary>
    public IReadOnlyDictionary<string, string> Metadata { get; }

    /// <summary>All tensors by name.</summary>
    public IReadOnlyDictionary<string, SafetensorsTensor> Tensors => _tensors;

    /// <summary>Maps the file and checks its header.</summary>
    /// <exception cref="InvalidFileException">The file does not exist, or the header is at fault.</exception>
    public static SafetensorsFile Open(string path)
    {
        if (!File.Exists(path))
        {
            throw new InvalidFileException(path, "file", "does not exist");
        }

        var stream = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read, 1);
        MemoryMappedFile? map = null;
        try
        {
            long bytes = stream.Length;
            if (bytes < 8)
            {
                throw new InvalidFileException(path, "header", $"is cut off: the file has only {bytes} bytes");
            }

            map = MemoryMappedFile.CreateFromFile(
                stream, null, 0, MemoryMappedFileAccess.Read, HandleInheritability.None, leaveOpen: false);
            return new SafetensorsFile(path, map, bytes);
        }
        catch
        {
            map?.Dispose();
            stream.Dispose();
            throw;
        }
    }

    /// <summary>The tensor of that name.</summary>
    /// <exception cref="InvalidFileException">The file has no such tensor.</exception>
    public SafetensorsTensor Get(string name) =>
        _tensors.GetValueOrDefault(name) ?? throw new InvalidFileException(Path, name, "tensor is missing");

    public void Dispose()
    {
        if (_data != null)
        {
            _data = null;
            _view.SafeMemoryMappedViewHandle.ReleasePointer();
            _view.Dispose();
            _file.Dispose();
        }
    }

    /// <summary>Address of a data byte. Offsets come from the checked header only.</summary>
    internal byte* AddressOf(long offset)
    {
        ObjectDisposedException.ThrowIf(_data == null, this);
        return _data + offset;
    }
}
