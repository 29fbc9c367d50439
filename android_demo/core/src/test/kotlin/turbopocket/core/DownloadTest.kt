// SPDX-License-Identifier: Apache-2.0
package turbopocket.core

import com.sun.net.httpserver.HttpExchange
import com.sun.net.httpserver.HttpServer
import kotlinx.serialization.json.JsonNull
import org.junit.jupiter.api.AfterEach
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertFalse
import org.junit.jupiter.api.Assertions.assertThrows
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.BeforeEach
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import turbopocket.core.artifact.Artifact
import turbopocket.core.artifact.Download
import turbopocket.core.artifact.DownloadProgress
import turbopocket.core.artifact.MANIFEST_NAME
import java.io.File
import java.net.InetAddress
import java.net.InetSocketAddress

/** Downloads from a server on this machine. */
class DownloadTest {
    @TempDir lateinit var source: File
    @TempDir lateinit var folder: File
    private lateinit var server: HttpServer
    private lateinit var scratch: Scratch
    private val asked = ArrayList<String>()
    private var breaksOff: String? = null

    @BeforeEach
    fun serve() {
        scratch = Scratch(source)
        server = HttpServer.create(InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 0)
        server.createContext("/models/one/") { exchange -> exchange.use { answer(it) } }
        server.start()
    }

    @AfterEach
    fun stop() = server.stop(0)

    private fun answer(exchange: HttpExchange) {
        val path = exchange.requestURI.path.removePrefix("/models/one/")
        val range = exchange.requestHeaders.getFirst("Range")
        asked += path + (range?.let { " $it" } ?: "")
        val file = File(source, path)
        if (!file.isFile) return exchange.sendResponseHeaders(404, -1)
        val from = range?.removePrefix("bytes=")?.removeSuffix("-")?.toInt() ?: 0
        val bytes = file.readBytes().drop(from).toByteArray()
        exchange.sendResponseHeaders(if (range == null) 200 else 206, bytes.size.toLong())
        val sent = if (breaksOff == path) bytes.copyOf(bytes.size / 2) else bytes
        exchange.responseBody.write(sent)
        exchange.responseBody.flush()
    }

    private fun download() = Download("http://127.0.0.1:${server.address.port}/models/one/", folder)

    @Test
    fun `a downloaded artifact is the artifact`() {
        val seen = ArrayList<DownloadProgress>()
        val artifact = download().run(progress = seen::add)
        for (entry in artifact.manifest.files) assertTrue(artifact.file(entry.path).isFile)
        assertEquals(artifact.totalBytes, seen.last().done)
        assertEquals(seen.map { it.done }.sorted(), seen.map { it.done })
        assertFalse(File(folder, ".download").exists())
    }

    @Test
    fun `what broke off goes on where it was`() {
        breaksOff = "unet/model.onnx.data"
        assertRefused("broke off") { download().run() }
        assertFalse(File(folder, MANIFEST_NAME).exists(), "half an artifact is none")
        breaksOff = null
        val before = asked.toList()
        asked.clear()
        download().run()
        val half = File(source, "unet/model.onnx.data").length() / 2
        assertTrue("unet/model.onnx.data bytes=$half-" in asked, asked.toString())
        val whole = before.filter { it != MANIFEST_NAME && it != "unet/model.onnx.data" }
        assertTrue(whole.isNotEmpty() && whole.none { it in asked }, "fetched twice: ${whole.filter { it in asked }}")
    }

    @Test
    fun `a file that came otherwise is refused, and fetched anew`() {
        val path = "vae_decoder/model.onnx"
        val own = File(source, path).readBytes()
        File(source, path).writeBytes(own.copyOf().also { it[100] = (it[100] + 1).toByte() })
        assertRefused("$path came otherwise than the manifest says") { download().run() }
        assertFalse(File(folder, path).exists())
        File(source, path).writeBytes(own)
        download().run()
    }

    @Test
    fun `more bytes than are listed are not taken`() {
        val path = "vae_decoder/model.onnx"
        File(source, path).appendBytes(ByteArray(1 shl 20))
        assertRefused("more than the") { download().run() }
    }

    @Test
    fun `an unproven artifact is not fetched`() {
        scratch.set("parity", JsonNull)
        assertRefused("was never compared with PyTorch") { download().run() }
        assertEquals(listOf(MANIFEST_NAME), asked)
    }

    @Test
    fun `a missing file is named`() {
        File(source, "unet/model.onnx").delete()
        assertRefused("unet/model.onnx can not be had") { download().run() }
    }

    @Test
    fun `a cancelled download leaves no artifact`() {
        var calls = 0
        assertThrows(Cancelled::class.java) { download().run(cancelled = { ++calls > 5 }) }
        assertRefused("is not an artifact") { Artifact.open(folder) }
    }
}

private fun HttpExchange.use(block: (HttpExchange) -> Unit) = try {
    block(this)
} finally {
    close()
}
