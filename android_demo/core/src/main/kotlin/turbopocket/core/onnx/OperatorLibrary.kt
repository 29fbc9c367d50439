// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.onnx

import turbopocket.core.refuse
import java.io.File
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel

/**
 * Refuses a shared library that lacks bytes its own header tells of.
 *
 * Loaders map what is missing all the same, and the process ends with a bus error once that is read. Of a file that is
 * no ELF file (System V ABI, "Object Files"), loaders say so themselves.
 */
internal fun requireWhole(library: File) {
    if (!library.isFile) refuse("the operators' library $library is missing")
    RandomAccessFile(library, "r").use { file ->
        val content = file.channel.map(FileChannel.MapMode.READ_ONLY, 0, file.length())
        if (ELF.indices.any { content.limit() <= it || content.get(it) != ELF[it] }) return
        val needed = try {
            elfBytes(content)
        } catch (_: IndexOutOfBoundsException) {
            Long.MAX_VALUE
        }
        if (needed > content.limit()) {
            refuse("$library is cut off: it has ${content.limit()} bytes, its header tells of more")
        }
    }
}

/** Where the last table, or the last piece that is loaded, ends. */
private fun elfBytes(content: ByteBuffer): Long {
    val wide = content.get(4).toInt() == 2
    content.order(if (content.get(5).toInt() == 1) ByteOrder.LITTLE_ENDIAN else ByteOrder.BIG_ENDIAN)
    fun word(at: Int): Long = if (wide) content.getLong(at) else content.getInt(at).toLong() and 0xFFFFFFFFL
    fun half(at: Int): Int = content.getShort(at).toInt() and 0xFFFF

    val size = if (wide) 8 else 4
    val tables = if (wide) 32 else 28
    val counts = tables + 2 * size + 6 // behind the flags and the header's own size
    val segments = word(tables)
    val segmentSize = half(counts)
    val segmentCount = half(counts + 2)
    var end = maxOf(
        segments + segmentSize.toLong() * segmentCount,
        word(tables + size) + half(counts + 4).toLong() * half(counts + 6),
    )
    if (segments > content.limit()) return Long.MAX_VALUE
    for (index in 0 until segmentCount) {
        val offset = segments.toInt() + index * segmentSize + if (wide) 8 else 4
        end = maxOf(end, word(offset) + word(offset + 3 * size))
    }
    return end
}

private val ELF = byteArrayOf(0x7F, 'E'.code.toByte(), 'L'.code.toByte(), 'F'.code.toByte())
