// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.drawing

import java.io.ByteArrayOutputStream
import java.io.DataOutputStream
import java.util.zip.CRC32
import java.util.zip.Deflater

/** Red, green and blue of 8 bits, [height, width, 3]. */
class Picture(val height: Int, val width: Int, val pixels: ByteArray) {
    /** The picture as a PNG file (ISO/IEC 15948): 8 bits a channel, rows as they are. */
    fun png(): ByteArray {
        val rows = ByteArray(height * (1 + 3 * width))
        for (row in 0 until height) {
            pixels.copyInto(rows, row * (1 + 3 * width) + 1, row * 3 * width, (row + 1) * 3 * width)
        }
        val file = ByteArrayOutputStream()
        val out = DataOutputStream(file)
        out.write(byteArrayOf(0x89.toByte(), 'P'.code.toByte(), 'N'.code.toByte(), 'G'.code.toByte(), 13, 10, 26, 10))
        val header = ByteArrayOutputStream()
        DataOutputStream(header).apply {
            writeInt(width)
            writeInt(height)
            write(byteArrayOf(8, TRUE_COLOUR, 0, 0, 0))
        }
        out.chunk("IHDR", header.toByteArray())
        out.chunk("IDAT", deflated(rows))
        out.chunk("IEND", ByteArray(0))
        return file.toByteArray()
    }

    private fun DataOutputStream.chunk(name: String, content: ByteArray) {
        val named = name.toByteArray(Charsets.US_ASCII) + content
        writeInt(content.size)
        write(named)
        writeInt(CRC32().apply { update(named) }.value.toInt())
    }

    private fun deflated(bytes: ByteArray): ByteArray {
        val deflater = Deflater()
        try {
            deflater.setInput(bytes)
            deflater.finish()
            val out = ByteArrayOutputStream()
            val piece = ByteArray(1 shl 16)
            while (!deflater.finished()) out.write(piece, 0, deflater.deflate(piece))
            return out.toByteArray()
        } finally {
            deflater.end()
        }
    }

    private companion object {
        const val TRUE_COLOUR: Byte = 2
    }
}
