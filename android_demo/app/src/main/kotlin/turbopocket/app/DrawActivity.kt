// SPDX-License-Identifier: Apache-2.0
package turbopocket.app

import android.app.Activity
import android.app.AlertDialog
import android.content.Intent
import android.graphics.BitmapFactory
import android.os.Bundle
import android.os.Handler
import android.os.Looper
import android.text.InputType
import android.widget.Button
import android.widget.EditText
import android.widget.ImageView
import android.widget.LinearLayout
import android.widget.ProgressBar
import android.widget.ScrollView
import android.widget.TextView
import turbopocket.core.Cancelled
import turbopocket.core.Refused
import turbopocket.core.artifact.Artifact
import turbopocket.core.artifact.Download
import turbopocket.core.drawing.Cancellation
import turbopocket.core.drawing.Progress
import turbopocket.core.drawing.Wish
import turbopocket.core.drawing.megabytes
import java.io.File
import java.io.IOException
import java.util.concurrent.Executors

/** The one screen: a model, a prompt, a seed; draw, or cancel; the picture, time left and memory. */
class DrawActivity : Activity() {
    private val screen = Handler(Looper.getMainLooper())
    private val worker = Executors.newSingleThreadExecutor()
    private val work by lazy { Work(applicationContext) }
    private var cancellation: Cancellation? = null
    private var chosen: File? = null

    private val model by lazy { Button(this).apply { setOnClickListener { chooseModel() } } }
    private val prompt by lazy { EditText(this).apply { hint = "What the picture shall show" } }
    private val seed by lazy {
        EditText(this).apply {
            inputType = InputType.TYPE_CLASS_NUMBER
            setText("0")
        }
    }
    private val draw by lazy { Button(this).apply { setOnClickListener { drawOrCancel() } } }
    private val bar by lazy { ProgressBar(this, null, android.R.attr.progressBarStyleHorizontal) }
    private val status by lazy { TextView(this) }
    private val picture by lazy { ImageView(this).apply { adjustViewBounds = true } }

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        val column = LinearLayout(this).apply { orientation = LinearLayout.VERTICAL }
        for (view in listOf(model, prompt, seed, draw, bar, status, picture)) column.addView(view)
        setContentView(ScrollView(this).apply { addView(column) })
        choose(work.models.folders().firstOrNull())
        idle("${megabytes(work.freeBytes())} of memory are free")
    }

    override fun onDestroy() {
        cancellation?.cancel()
        worker.shutdown()
        super.onDestroy()
    }

    private fun choose(folder: File?) {
        chosen = folder
        model.text = folder?.let(work.models::line) ?: "No model yet: add one"
    }

    private fun chooseModel() {
        val folders = work.models.folders()
        val lines = folders.map(work.models::line) + "Add a folder…" + "Download…"
        AlertDialog.Builder(this).setItems(lines.toTypedArray()) { _, index ->
            when (index) {
                folders.size -> startActivityForResult(Intent(Intent.ACTION_OPEN_DOCUMENT_TREE), PICK)
                folders.size + 1 -> askAddress()
                else -> choose(folders[index])
            }
        }.show()
    }

    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        val tree = data?.data
        if (request != PICK || result != RESULT_OK || tree == null) return
        start("Copying…") {
            val folder = work.models.import(contentResolver, tree)
            Artifact.open(folder)
            screen.post { choose(folder) }
        }
    }

    private fun askAddress() {
        val address = EditText(this).apply { hint = "https://…" }
        AlertDialog.Builder(this).setTitle("Address of an artifact's folder").setView(address)
            .setPositiveButton("Download") { _, _ -> download(address.text.toString().trim()) }.show()
    }

    private fun download(address: String) = start("Downloading…") { stop ->
        val folder = work.models.folder(address.trimEnd('/').substringAfterLast('/'))
        val cancelled = { runCatching { stop.check() }.isFailure }
        Download(address, folder).run(cancelled) {
            show((100 * it.done / it.total.coerceAtLeast(1)).toInt(), "Downloading…")
        }
        screen.post { choose(folder) }
    }

    private fun drawOrCancel() {
        cancellation?.let { return it.cancel() }
        val folder = chosen ?: return status.setText("Add a model first")
        val wish = Wish(prompt.text.toString(), seed.text.toString().toLongOrNull() ?: 0)
        start("Starting…") { stop ->
            val begun = System.nanoTime()
            val png = work.draw(folder, wish, stop) { show(begun, it) }.png()
            val bitmap = BitmapFactory.decodeByteArray(png, 0, png.size)
            screen.post { picture.setImageBitmap(bitmap) }
        }
    }

    private fun start(words: String, what: (Cancellation) -> Unit) {
        if (cancellation != null) return
        val stop = Cancellation().also { cancellation = it }
        draw.text = "Cancel"
        status.text = words
        worker.execute {
            val end = try {
                what(stop)
                "Done"
            } catch (_: Cancelled) {
                "Cancelled"
            } catch (error: Refused) {
                error.message.orEmpty()
            } catch (error: IOException) {
                "The files can not be read or written: ${error.message}"
            } catch (_: OutOfMemoryError) {
                "There is not enough memory for this model"
            }
            screen.post { idle("$end. ${megabytes(work.freeBytes())} of memory are free") }
        }
    }

    private fun show(begun: Long, progress: Progress) {
        val seconds = (System.nanoTime() - begun) / 1e9
        val left = seconds / progress.done * (progress.total - progress.done)
        val memory = megabytes(work.freeBytes())
        show(100 * progress.done / progress.total, "${progress.component}: ${left.toInt()} s left, $memory free")
    }

    private fun show(percent: Int, words: String) {
        screen.post {
            bar.progress = percent
            status.text = words
        }
    }

    private fun idle(words: String) {
        cancellation = null
        draw.text = "Draw"
        bar.progress = 0
        status.text = words
    }

    private companion object {
        const val PICK = 1
    }
}
